"""select: v = Σ_m a_m·act(z_m); and the writing pass of its backward. Every value is read, worked on and written by itself.

What the writing pass needs of all pixels comes before it, and is in squeeze.py: `select_backward_sums`, and `fold_backward`, which
gives t, p and q.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import THREADS, WARPS, activate, ceil_div, channel_lanes, channel_vector, gate, is_channels_last, row_vector


@triton.jit
def _per_vector(array, at, at_next, exists, exists_next, crosses, STRADDLES: tl.constexpr):
    """Numbers of a small array for vectors of a contiguous tensor: array[at], and array[at_next] where `crosses`. (vectors, 1), or, if
    vectors may cross, (vectors, VECTOR)."""
    number = tl.load(array + at, exists, 0.0)[:, None]
    if STRADDLES:
        number = tl.where(crosses, tl.load(array + at_next, exists_next, 0.0)[:, None], number)
    return number


@triton.jit
def _per_channel(array, at, exists):
    """Numbers of a small array for the channels of a tile of a channels_last tensor, (1, channels)."""
    return tl.load(array + at, exists, 0.0)[None, :]


@triton.jit
def _vector_rows(first, C, pixels, VECTOR: tl.constexpr, STRADDLES: tl.constexpr, VECTORS: tl.constexpr):
    """Of VECTORS vectors of a contiguous tensor, from the one numbered `first` on: image and channel of the row that each begins
    in, image and channel of the next row, and which of its values are of that next row.

    Vectors are cut without regard to rows, so that every access is 16 bytes wide also where a row, of 7 × 7 values, is no
    multiple of that. VECTOR is at most the length of a row: a vector is of two rows at most, and takes the numbers of both."""
    start = first * VECTOR
    row = start // pixels
    image = row // C
    local = (start - row * pixels).to(tl.int32) + tl.arange(0, VECTORS) * VECTOR
    crossed = local // pixels
    channel = (row - image * C).to(tl.int32) + crossed
    b, c = image + channel // C, channel % C
    crosses = (local - crossed * pixels)[:, None] + tl.arange(0, VECTOR)[None, :] >= pixels
    if STRADDLES:
        return b, c, image + (channel + 1) // C, (channel + 1) % C, crosses
    else:
        return b, c, b, c, crosses


@triton.jit(do_not_specialize=["B", "C", "pixels", "vectors"])
def _select_contiguous_kernel(
    ys, mean, scale, bias, a, v, B, C, pixels, vectors, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr, STRADDLES: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """A program: VECTORS vectors of v, wherever they lie in its rows. It reads the same ones of every branch, and for each the numbers of its
    row: mean, scale, bias and a; of two rows, if it STRADDLES."""
    A: tl.constexpr = mean.dtype.element_ty
    M: tl.constexpr = len(ys)
    first = tl.program_id(0).to(tl.int64) * VECTORS
    b, c, b_next, c_next, crosses = _vector_rows(first, C, pixels, VECTOR, STRADDLES, VECTORS)
    vector = first + tl.arange(0, VECTORS)
    offsets = vector[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    exists, exists_next = vector < vectors, b_next < B
    total = tl.zeros((VECTORS, VECTOR), A)
    for m in tl.static_range(M):
        y = tl.load(ys[m] + offsets, exists[:, None], 0.0).to(A)
        at, at_next = m * C + c, m * C + c_next
        c_mean = _per_vector(mean, at, at_next, exists, exists_next, crosses, STRADDLES)
        c_scale = _per_vector(scale, at, at_next, exists, exists_next, crosses, STRADDLES)
        c_bias = _per_vector(bias, at, at_next, exists, exists_next, crosses, STRADDLES)
        weight = _per_vector(a, (b * M + m) * C + c, (b_next * M + m) * C + c_next, exists, exists_next, crosses, STRADDLES)
        total += weight * activate((y - c_mean) * c_scale + c_bias, negative_slope, ACTIVATION)
    tl.store(v + offsets, total.to(v.dtype.element_ty), exists[:, None])


@triton.jit
def _block_of(pixels, vectors, part_pixels, VECTOR: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program, channels_last: its image, its first pixel there and the one after its last, its channels, and which there are."""
    blocks = tl.cdiv(vectors * VECTOR, CHANNELS)
    parts = tl.cdiv(pixels, part_pixels)
    program = tl.program_id(0)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    start = program // blocks % parts * part_pixels
    return (program // blocks // parts).to(tl.int64), start, tl.minimum(pixels, start + part_pixels), c, c // VECTOR < vectors


@triton.jit
def _image_pixels(b, pixel, end, pixels, c, exists, vectors, VECTOR: tl.constexpr, PIXELS: tl.constexpr):
    """PIXELS pixels of image b, channels_last, from `pixel` on, but none from `end` on: where they begin, the offsets of their channels c from
    there, (pixels, channels), and which there are."""
    number = tl.arange(0, PIXELS)
    inside = (number < end - pixel)[:, None] & exists[None, :]
    return (b * pixels + pixel) * vectors * VECTOR, (number * vectors)[:, None] * VECTOR + c[None, :], inside


@triton.jit(do_not_specialize=["pixels", "vectors", "part_pixels"])
def _select_channels_last_kernel(
    ys, mean, scale, bias, a, v, pixels, vectors, part_pixels, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: CHANNELS channels of v in `part_pixels` pixels of one image, PIXELS at a time. It reads mean, scale, bias and a of these
    channels once, then the same tiles of every branch."""
    A: tl.constexpr = mean.dtype.element_ty
    M: tl.constexpr = len(ys)
    C = vectors * VECTOR
    b, start, end, c, exists = _block_of(pixels, vectors, part_pixels, VECTOR, CHANNELS)
    numbers = ()
    for m in tl.static_range(M):
        at = m * C + c
        normal = _per_channel(mean, at, exists), _per_channel(scale, at, exists), _per_channel(bias, at, exists)
        numbers += (normal + (_per_channel(a, (b * M + m) * C + c, exists),),)
    for pixel in tl.range(start, end, PIXELS, num_stages=STAGES):
        first, offsets, inside = _image_pixels(b, pixel, end, pixels, c, exists, vectors, VECTOR, PIXELS)
        total = tl.zeros((PIXELS, CHANNELS), A)
        for m in tl.static_range(M):
            c_mean, c_scale, c_bias, weight = numbers[m]
            y = tl.load(ys[m] + first + offsets, inside, 0.0).to(A)
            total += weight * activate((y - c_mean) * c_scale + c_bias, negative_slope, ACTIVATION)
        tl.store(v + first + offsets, total.to(v.dtype.element_ty), inside)


def _select_contiguous_block(y: Tensor, M: int) -> dict[str, int | bool]:
    """How contiguous memory is cut. Of each branch a thread has 2 vectors in flight; one of more than two branches."""
    B, C, H, W = y.shape
    vector = row_vector(y, H * W)
    return {"VECTOR": vector, "STRADDLES": H * W % vector != 0, "VECTORS": THREADS * (2 if M <= 2 else 1)}


def _select_channels_last_block(y: Tensor, M: int) -> dict[str, int]:
    """How channels_last memory is cut. While a tile is worked on, the next ones are on their way into shared memory: more bytes than
    registers would hold, where they have a program's numbers already."""
    vector = channel_vector(y, M)
    lanes = channel_lanes(y, vector, y.shape[0])
    return {"VECTOR": vector, "CHANNELS": lanes * vector, "PIXELS": THREADS // lanes, "STAGES": 4}


# Channels_last: enough programs that the last ones to end are few of all, and of no fewer tiles than make their start worth it.
_PROGRAMS, _LEAST_TILES = 4096, 8


def _launch_select(contiguous_kernel, channels_last_kernel, y: Tensor, M: int, arrays: tuple, activation: str, negative_slope: float) -> None:
    """Whichever of the kernels is for the layout of y, which stands for every branch."""
    B, C, H, W = y.shape
    if is_channels_last(y):
        block = _select_channels_last_block(y, M)
        blocks, tiles = B * ceil_div(C, block["CHANNELS"]), ceil_div(H * W, block["PIXELS"])
        part_pixels = max(_LEAST_TILES, ceil_div(tiles, ceil_div(_PROGRAMS, blocks))) * block["PIXELS"]
        grid = (blocks * ceil_div(H * W, part_pixels),)
        kernel, sizes = channels_last_kernel, (H * W, C // block["VECTOR"], part_pixels)
    else:
        block = _select_contiguous_block(y, M)
        vectors = B * C * H * W // block["VECTOR"]
        grid = (ceil_div(vectors, block["VECTORS"]),)
        kernel, sizes = contiguous_kernel, (B, C, H * W, vectors)
    kernel[grid](*arrays, *sizes, negative_slope, ACTIVATION=activation, **block, num_warps=WARPS)


def select(ys, mean, scale, bias, a, activation: str, negative_slope: float, v: Tensor | None = None) -> Tensor:
    """v, in the dtype and layout of the branches, into the tensor given if there is one.

    Floor: every branch is read once, v written once."""
    v = torch.empty_like(ys[0]) if v is None else v
    arrays = tuple(ys), mean, scale, bias, a, v
    _launch_select(_select_contiguous_kernel, _select_channels_last_kernel, v, len(ys), arrays, activation, negative_slope)
    return v


@triton.jit(do_not_specialize=["B", "C", "pixels", "vectors"])
def _select_backward_contiguous_kernel(
    g, ys, mean, scale, bias, a, t, p, q, dys, B, C, pixels, vectors, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr, STRADDLES: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """A program: VECTORS vectors of every dy. It reads the same ones of g and of every branch, and the numbers of their rows."""
    A: tl.constexpr = mean.dtype.element_ty
    M: tl.constexpr = len(ys)
    first = tl.program_id(0).to(tl.int64) * VECTORS
    b, c, b_next, c_next, crosses = _vector_rows(first, C, pixels, VECTOR, STRADDLES, VECTORS)
    vector = first + tl.arange(0, VECTORS)
    offsets = vector[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    exists, exists_next = vector < vectors, b_next < B
    gradient = tl.load(g + offsets, exists[:, None], 0.0).to(A)
    share = _per_vector(t, b * C + c, b_next * C + c_next, exists, exists_next, crosses, STRADDLES)
    for m in tl.static_range(M):
        d = tl.load(ys[m] + offsets, exists[:, None], 0.0).to(A)
        at, at_next = m * C + c, m * C + c_next
        d -= _per_vector(mean, at, at_next, exists, exists_next, crosses, STRADDLES)
        c_scale = _per_vector(scale, at, at_next, exists, exists_next, crosses, STRADDLES)
        z = d * c_scale + _per_vector(bias, at, at_next, exists, exists_next, crosses, STRADDLES)
        weight = _per_vector(a, (b * M + m) * C + c, (b_next * M + m) * C + c_next, exists, exists_next, crosses, STRADDLES)
        dz = gate(z, weight * gradient + share, negative_slope, ACTIVATION)
        dy = c_scale * dz - _per_vector(p, at, at_next, exists, exists_next, crosses, STRADDLES)
        dy -= d * _per_vector(q, at, at_next, exists, exists_next, crosses, STRADDLES)
        tl.store(dys[m] + offsets, dy.to(g.dtype.element_ty), exists[:, None])


@triton.jit(do_not_specialize=["pixels", "vectors", "part_pixels"])
def _select_backward_channels_last_kernel(
    g, ys, mean, scale, bias, a, t, p, q, dys, pixels, vectors, part_pixels, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program: CHANNELS channels of every dy in `part_pixels` pixels of one image, PIXELS at a time. It reads the numbers of these channels
    once, then the same tiles of g and of every branch."""
    A: tl.constexpr = mean.dtype.element_ty
    M: tl.constexpr = len(ys)
    C = vectors * VECTOR
    b, start, end, c, exists = _block_of(pixels, vectors, part_pixels, VECTOR, CHANNELS)
    share = _per_channel(t, b * C + c, exists)
    numbers = ()
    for m in tl.static_range(M):
        at = m * C + c
        normal = _per_channel(mean, at, exists), _per_channel(scale, at, exists), _per_channel(bias, at, exists)
        numbers += (normal + (_per_channel(a, (b * M + m) * C + c, exists), _per_channel(p, at, exists), _per_channel(q, at, exists)),)
    for pixel in tl.range(start, end, PIXELS, num_stages=STAGES):
        first, offsets, inside = _image_pixels(b, pixel, end, pixels, c, exists, vectors, VECTOR, PIXELS)
        gradient = tl.load(g + first + offsets, inside, 0.0).to(A)
        for m in tl.static_range(M):
            c_mean, c_scale, c_bias, weight, c_p, c_q = numbers[m]
            d = tl.load(ys[m] + first + offsets, inside, 0.0).to(A) - c_mean
            dz = gate(d * c_scale + c_bias, weight * gradient + share, negative_slope, ACTIVATION)
            tl.store(dys[m] + first + offsets, (c_scale * dz - c_p - d * c_q).to(g.dtype.element_ty), inside)


def select_backward(g, ys, mean, scale, bias, a, t, p, q, activation: str, negative_slope: float) -> list[Tensor]:
    """dy of every branch, in its dtype and layout.

    Floor: g and every branch are read once, every dy written once."""
    dys = [torch.empty_like(y) for y in ys]
    arrays = g, tuple(ys), mean, scale, bias, a, t, p, q, tuple(dys)
    _launch_select(_select_backward_contiguous_kernel, _select_backward_channels_last_kernel, g, len(ys), arrays, activation, negative_slope)
    return dys
