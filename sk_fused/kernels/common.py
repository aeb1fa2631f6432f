"""What the kernels share: the activation, how a tensor's memory is cut into 16-byte accesses, and the constants of a launch.

A branch is read as its memory lies. Contiguous: rows, one for each image and channel, of H·W values. channels_last: rows, one
for each pixel, of C values. Either way a thread takes `VECTOR` neighbouring values at a time, 16 bytes where the sizes allow it,
and offsets are written as (an index of vectors)·VECTOR, so that the compiler can see that they are aligned; hence no size
needs to be specialised on, and a kernel is compiled once for all of them.

In every kernel: the pointers are to dense arrays, of the shapes that sk_fused/backends/reference.py lists if nothing else is said; of
what there is one for each branch, `ys` for example, a tuple has them, and loops over it are unrolled. Names in capitals are what a kernel
is compiled for; A is the dtype of sums and small arrays. `pixels` is H·W, `vectors` how many vectors there are: in contiguous memory
of a whole tensor, in channels_last of a pixel, C/VECTOR. The sides of a tile are powers of two, so it may reach beyond what there is:
masks say which channels, rows or images there are, `exists`, what a load may read, `read`, and what counts, `inside`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..backends.reference import accumulate_dtype

# Threads of a program, in warps of 32. More programs of few threads hide the latency of memory as well as fewer of many, and
# balance better.
WARPS = 4
THREADS = 32 * WARPS

# Programs that keep today's GPUs busy: of 108 to 148 multiprocessors, each holds several.
ENOUGH_PROGRAMS = 512


@triton.jit
def activate(z, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(z), NaN where z is."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z <= 0, z * negative_slope, z)
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def gate(z, value, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr):
    """act'(z)·value."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, value)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z <= 0, value * negative_slope, value)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        return sigmoid * (1.0 + z * (1.0 - sigmoid)) * value
    else:
        tl.static_assert(ACTIVATION == "identity")
        return value


@triton.jit
def fold(norms, eps, m, c, exists, A: tl.constexpr):
    """mean, r = 1/√(var + eps), scale = weight·r and bias of the channels c of branch m, which the compiler need not know, of the
    batch-norms `norms`: weights, biases, means and variances, of each a tuple of the branches' vectors, (C,)."""
    weights, biases, means, variances = norms
    mean, var, weight, bias = tl.zeros(c.shape, A), tl.zeros(c.shape, A), tl.zeros(c.shape, A), tl.zeros(c.shape, A)
    # The vectors of the branches may differ in dtype.
    for i in tl.static_range(len(means)):
        ours = exists & (m == i)
        mean += tl.load(means[i] + c, ours, 0.0).to(A)
        var += tl.load(variances[i] + c, ours, 0.0).to(A)
        if weights[i] is not None:
            weight += tl.load(weights[i] + c, ours, 0.0).to(A)
        else:
            weight = tl.where(ours, 1.0, weight)
        if biases[i] is not None:
            bias += tl.load(biases[i] + c, ours, 0.0).to(A)
    r = tl.rsqrt(var + eps)
    return mean, r, weight * r, bias


@triton.jit
def of_branch(values, m):
    """values[m], of a tuple, of an m that the compiler does not know."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(m == i, values[i], value)
    return value


@triton.jit
def zeros(shape: tl.constexpr, dtype: tl.constexpr, COUNT: tl.constexpr):
    """A tuple of COUNT accumulators."""
    accumulators = ()
    for _ in tl.static_range(COUNT):
        accumulators += (tl.zeros(shape, dtype),)
    return accumulators


def is_channels_last(y: Tensor) -> bool:
    """Whether the rows of y's memory are pixels; maps of 1 × 1 are, either way, and have longer rows so."""
    return not y.is_contiguous() or y.shape[2] * y.shape[3] == 1


def row_vector(y: Tensor, length: int) -> int:
    """Values of one access to contiguous memory: 16 bytes, if that divides the size of the tensor and is at most `length`."""
    vector = 16 // y.element_size()
    return vector if y.numel() % vector == 0 and vector <= length else 1


def channel_vector(y: Tensor, M: int) -> int:
    """Values of one access to channels_last memory: 16 bytes, if that divides the number of channels. A thread keeps a few numbers
    for every channel that it works on, of M branches at once: of many branches its accesses are shorter, for these to fit into
    registers."""
    vector = 16 // y.element_size()
    if y.shape[1] % vector:
        return 1
    return min(vector, max(1, 16 // power_of_two(M) * 4 // accumulate_dtype(y.dtype).itemsize))


def channel_lanes(y: Tensor, vector: int, programs: int) -> int:
    """Neighbouring threads that take neighbouring vectors of a pixel, a warp of them at most: the more, the fewer threads have the
    same channels, with their numbers and sums. As many as leave programs enough, where every block of channels has `programs`; not
    below the 32 bytes that memory gives at least."""
    C = y.shape[1]
    lanes = max(2, min(32, power_of_two(ceil_div(C, vector))))
    while lanes > 2 and programs * ceil_div(C, lanes * vector) < ENOUGH_PROGRAMS:
        lanes //= 2
    return lanes


def power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


def dense(arrays: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Small arrays as a kernel takes them: contiguous."""
    return tuple(None if array is None else array.contiguous() for array in arrays)
