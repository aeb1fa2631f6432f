"""What the kernels share: the activation, how a tensor's memory is cut into 16-byte accesses, and the constants of a launch.

A branch is read as its memory lies. Contiguous: rows, one for each image and channel, of H·W values. channels_last: rows, one
for each pixel, of C values. Either way a thread takes `VECTOR` neighbouring values at a time, 16 bytes where the sizes allow it,
and offsets are written as (an index of vectors)·VECTOR, so that the compiler can see that they are aligned; hence no size
needs to be specialised on, and a kernel is compiled once for all of them.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def zeros(shape: tl.constexpr, dtype: tl.constexpr, COUNT: tl.constexpr):
    """A tuple of COUNT accumulators."""
    accumulators = ()
    for _ in tl.static_range(COUNT):
        accumulators += (tl.zeros(shape, dtype),)
    return accumulators


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(y: Tensor) -> bool:
    """Whether the rows of y's memory are pixels; maps of 1 × 1 are, either way, and have longer rows so."""
    return not y.is_contiguous() or y.shape[2] * y.shape[3] == 1


def largest_vector(y: Tensor, length: int) -> int:
    """How many values of y, a power of two that divides `length`, one access of at most 16 bytes takes."""
    return math.gcd(16 // y.element_size(), length)


def channel_vector(y: Tensor, M: int) -> int:
    """Values of a channels_last access. A thread keeps a few numbers for every channel that it works on, of M branches at once:
    of more than two branches its accesses are shorter, so that they fit into registers."""
    registers = 16 // power_of_two(M) * 4 // accumulate_dtype(y.dtype).itemsize
    return min(largest_vector(y, y.shape[1]), max(1, registers))


def power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


def dense(vectors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """As a kernel takes them: a tuple of contiguous vectors."""
    return tuple(None if vector is None else vector.contiguous() for vector in vectors)
