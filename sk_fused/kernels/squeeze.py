"""The sums over pixels: of a branch's batch statistics (`branch_statistics`), of the squeeze (`squeeze`), and, weighted by a gradient, of
the backward of select (`select_backward_sums`), on which all small gradients rest; and the small step that turns these into the
gradients of the batch-norms (`fold_backward`).

Every sum is taken in one fixed order: lanes of a tile, tiles in sequence, lanes together; no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.reference import accumulate_dtype
from .common import (
    ENOUGH_PROGRAMS,
    THREADS,
    WARPS,
    activate,
    ceil_div,
    channel_lanes,
    channel_vector,
    dense,
    fold,
    gate,
    is_channels_last,
    of_branch,
    power_of_two,
    row_vector,
    zeros,
)

# Of branch_statistics: so many, at most, that the second stage holds them in one tile.
_MOST_PARTS = 512


@triton.jit
def _window(row, exists, pixels, VECTOR: tl.constexpr, STRADDLES: tl.constexpr):
    """The aligned vectors that cover the rows of a contiguous tensor: the first one's index, how many, and how many values of
    the first belong to the row before.

    A row of 7 × 7 values begins wherever it begins, mostly not at a multiple of 16 bytes. Its vectors are read whole, with up
    to VECTOR − 1 values of either neighbour, which are then set aside: so every access stays 16 bytes wide, and what is read
    twice is read from the cache. VECTOR divides the size of the tensor: nothing outside it is read."""
    start = row * pixels
    first = start // VECTOR
    if STRADDLES:
        lead = (start - first * VECTOR).to(tl.int32)
    else:
        lead = tl.zeros_like(row).to(tl.int32)
    return first, tl.where(exists, (lead + pixels + VECTOR - 1) // VECTOR, 0), lead


@triton.jit
def _row_tile(first, count, lead, vector, pixels, VECTOR: tl.constexpr, STRADDLES: tl.constexpr):
    """Of the vectors of every row's window with the numbers `vector`: the offsets of their values, (rows, vectors, VECTOR), which are to be
    read, and which belong to the row."""
    value = tl.arange(0, VECTOR)[None, None, :]
    offsets = (first[:, None] + vector[None, :])[:, :, None] * VECTOR + value
    read = (vector[None, :] < count[:, None])[:, :, None]
    inside = tl.broadcast_to(read, offsets.shape)
    if STRADDLES:
        position = vector[None, :, None] * VECTOR + value - lead[:, None, None]
        inside = read & (position >= 0) & (position < pixels)
    return offsets, read, inside


@triton.jit
def _pixel_tile(c, vectors, VECTOR: tl.constexpr, UNROLL: tl.constexpr, PIXELS: tl.constexpr):
    """UNROLL times PIXELS pixels of a channels_last tensor: the offsets of their channels c from the first pixel, (UNROLL, PIXELS, channels),
    and the numbers of the pixels."""
    pixel = tl.arange(0, UNROLL)[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
    return (pixel * vectors)[:, :, None] * VECTOR + c[None, None, :], pixel[:, :, None]


@triton.jit
def _folded(m, c, exists, writes, norms, mean, r, scale, bias, C, eps: tl.constexpr):
    """mean, scale and bias of the channels c of branch m: made of the batch-norms `norms`, and written where `writes`; or read."""
    i = m * C + c
    # So are `norms` then; but triton 3.6 cannot compare a tuple that has a None in it.
    if r is None:
        return tl.load(mean + i, exists, 0.0), tl.load(scale + i, exists, 0.0), tl.load(bias + i, exists, 0.0)
    else:
        c_mean, c_r, c_scale, c_bias = fold(norms, eps, m, c, exists, mean.dtype.element_ty)
        tl.store(mean + i, c_mean, writes)
        tl.store(r + i, c_r, writes)
        tl.store(scale + i, c_scale, writes)
        tl.store(bias + i, c_bias, writes)
        return c_mean, c_scale, c_bias


@triton.jit
def _add_tile(
    sums, ys, g, start, offsets, read, inside, parameters, AXIS: tl.constexpr, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """sums[SUMS·m + i] + Σ over the AXIS of g·act(z), g·k, g·k·(y − mean), of the values at start + offsets; g is 1 if there is none.
    `parameters` are mean, scale and bias of every branch. What is read is counted where it is `inside`; all of it, if that is None."""
    A: tl.constexpr = sums[0].dtype
    if g is not None:
        weight = tl.load(g + start + offsets, read, 0.0).to(A)
    else:
        weight = tl.full(offsets.shape, 1.0, A)
    added = ()
    for m in tl.static_range(len(ys)):
        mean, scale, bias = parameters[m]
        d = tl.load(ys[m] + start + offsets, read, 0.0).to(A) - mean
        z = d * scale + bias
        added += (sums[SUMS * m] + _sum(weight * activate(z, negative_slope, ACTIVATION), inside, AXIS),)
        if SUMS == 3:
            k = gate(z, weight, negative_slope, ACTIVATION)
            added += (sums[SUMS * m + 1] + _sum(k, inside, AXIS), sums[SUMS * m + 2] + _sum(k * d, inside, AXIS))
    return added


@triton.jit
def _sum(values, inside, AXIS: tl.constexpr):
    """Σ over the AXIS of the values that are inside."""
    if inside is not None:
        values = tl.where(inside, values, 0.0)
    return tl.sum(values, AXIS)


@triton.jit
def _store_sums(sums, outputs, at, exists, AXIS: tl.constexpr, SUMS: tl.constexpr):
    """Σ over the AXIS of a branch's accumulators, each to its output."""
    for i in tl.static_range(SUMS):
        tl.store(outputs[i] + at, tl.sum(sums[i], AXIS), exists)


@triton.jit
def _branches_of(ys, g, program):
    """Of the program of this number: the number of its first branch, its branches, and what is left of its own number. Without g it has
    one branch, for which it has the more registers; with g, which is to be read once, it has all."""
    if g is None:
        return program % len(ys), (of_branch(ys, program % len(ys)),), program // len(ys)
    else:
        return 0, ys, program


@triton.jit(do_not_specialize=["B", "C", "pixels"])
def _squeeze_contiguous_kernel(
    ys, g, norms, mean, r, scale, bias, outputs, B, C, pixels, eps: tl.constexpr, negative_slope: tl.constexpr,
    ACTIVATION: tl.constexpr, SUMS: tl.constexpr, VECTOR: tl.constexpr, STRADDLES: tl.constexpr, ROWS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """A program: the sums of ROWS rows, VECTORS vectors of each at a time; of one branch, or, with g, of all.

    Without g it folds `norms`, for its own channels; if it has rows of the first image, it writes their mean, r, scale and bias. With g
    there are no norms and no r, and it reads mean, scale and bias. `outputs` are SUMS arrays, (B, M, C)."""
    M: tl.constexpr = len(ys)
    m, branches, program = _branches_of(ys, g, tl.program_id(0))
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = row // C
    c = (row - b * C).to(tl.int32)
    exists = b < B
    parameters = ()
    for i in tl.static_range(len(branches)):
        c_mean, c_scale, c_bias = _folded(m + i, c, exists, b == 0, norms, mean, r, scale, bias, C, eps)
        parameters += ((c_mean[:, None, None], c_scale[:, None, None], c_bias[:, None, None]),)
    first, count, lead = _window(row, exists, pixels, VECTOR, STRADDLES)
    sums = zeros((ROWS, VECTORS), mean.dtype.element_ty, len(branches) * SUMS)
    for done in range(0, tl.max(count, 0), VECTORS):
        offsets, read, inside = _row_tile(first, count, lead, done + tl.arange(0, VECTORS), pixels, VECTOR, STRADDLES)
        sums = _add_tile(sums, branches, g, 0, offsets, read, inside, parameters, 2, negative_slope, ACTIVATION, SUMS)
    for i in tl.static_range(len(branches)):
        _store_sums(sums[i * SUMS : (i + 1) * SUMS], outputs, (b * M + m + i) * C + c, exists, 1, SUMS)


@triton.jit(do_not_specialize=["parts", "vectors", "pixels", "part_pixels"])
def _squeeze_channels_last_kernel(
    ys, g, norms, mean, r, scale, bias, outputs, parts, vectors, pixels, part_pixels, eps: tl.constexpr, negative_slope: tl.constexpr,
    ACTIVATION: tl.constexpr, SUMS: tl.constexpr, VECTOR: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: the sums of CHANNELS channels of one of an image's `parts`, of `part_pixels` pixels, UNROLL·PIXELS at a time; of one branch,
    or, with g, of all. `outputs` are SUMS arrays, (B, M·parts, C); the rest is as in contiguous memory."""
    M: tl.constexpr = len(ys)
    STEP: tl.constexpr = UNROLL * PIXELS
    C = vectors * VECTOR
    blocks = tl.cdiv(C, CHANNELS)
    m, branches, program = _branches_of(ys, g, tl.program_id(0) // blocks)
    part, b = program % parts, (program // parts).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    exists = c // VECTOR < vectors
    parameters = ()
    for i in tl.static_range(len(branches)):
        c_mean, c_scale, c_bias = _folded(m + i, c, exists, exists & (program == 0), norms, mean, r, scale, bias, C, eps)
        parameters += ((c_mean[None, None, :], c_scale[None, None, :], c_bias[None, None, :]),)
    sums = zeros((PIXELS, CHANNELS), mean.dtype.element_ty, len(branches) * SUMS)
    offsets, tile = _pixel_tile(c, vectors, VECTOR, UNROLL, PIXELS)
    read = exists[None, None, :]
    start, end = part * part_pixels, tl.minimum(pixels, (part + 1) * part_pixels)
    whole = end - (end - start) % STEP
    for pixel in tl.range(start, whole, STEP, num_stages=STAGES):
        first = (b * pixels + pixel) * vectors * VECTOR
        sums = _add_tile(sums, branches, g, first, offsets, read, None, parameters, 0, negative_slope, ACTIVATION, SUMS)
    # What is left, if any: only it needs a mask.
    for pixel in range(whole, end, STEP):
        first, inside = (b * pixels + pixel) * vectors * VECTOR, tile < end - pixel
        sums = _add_tile(sums, branches, g, first, offsets, read & inside, inside, parameters, 0, negative_slope, ACTIVATION, SUMS)
    for i in tl.static_range(len(branches)):
        _store_sums(sums[i * SUMS : (i + 1) * SUMS], outputs, ((b * M + m + i) * parts + part) * C + c, exists, 0, SUMS)


# Pixels of a part of an image in `squeeze` with one sum, channels_last: enough for a program to be worth its start, few enough for
# one image to busy a GPU.
_PART_PIXELS = 1024


def _parts_of_image(y: Tensor, sums: int) -> int:
    """It depends on the size of the maps alone, so that a compiled graph takes batches of any size."""
    return ceil_div(y.shape[2] * y.shape[3], _PART_PIXELS) if sums == 1 and is_channels_last(y) else 1


def pooled_parts(ys: Sequence[Tensor], sums: int) -> int:
    """P of `squeeze`: the parts of every branch."""
    return len(ys) * _parts_of_image(ys[0], sums)


def _sums_contiguous_block(y: Tensor, M: int) -> dict[str, int | bool]:
    """How contiguous rows are cut. Of each branch a thread has 4 vectors in flight, fewer of more than two branches, and of float64,
    for which there would be no registers. A tile is as long as a row, as far as few lengths allow it: those of maps of 7 × 7, 14 × 14,
    28 × 28 and 56 × 56 in half precision, and what is between."""
    B, C, H, W = y.shape
    vector = row_vector(y, y.numel())
    straddles = H * W % vector != 0
    tile = max(THREADS, 32 * THREADS // max(2, power_of_two(M)) // accumulate_dtype(y.dtype).itemsize)
    longest = (H * W + 2 * vector - 2) // vector if straddles else H * W // vector
    vectors = next(length for length in (8, 32, 128, tile) if length >= min(longest, tile))
    return {"VECTOR": vector, "STRADDLES": straddles, "ROWS": tile // vectors, "VECTORS": vectors}


def _sums_channels_last_block(y: Tensor, tensors: int, programs: int) -> dict[str, int]:
    """How channels_last memory is cut, for `programs` to each block of channels, each of which reads so many tensors: one branch, or a
    gradient and all branches.

    While a tile is worked on, the next ones are on their way into shared memory: more bytes than registers would hold. A tile is one vector
    of a thread: of several, the compiler may lay out the sums anew in every step. Of one branch in float64 it is four all the same: the
    longer the chain of sums, the larger its error."""
    vector = channel_vector(y, max(1, tensors - 1))
    lanes = channel_lanes(y, vector, programs)
    if tensors == 1:
        # Of a whole warp of them a register spills on sm_80.
        lanes = min(lanes, 16)
    unroll, stages = (1, 4) if tensors > 1 else (4, 3) if y.dtype == torch.float64 else (1, 8)
    return {"VECTOR": vector, "CHANNELS": lanes * vector, "PIXELS": THREADS // lanes, "UNROLL": unroll, "STAGES": stages}


def _launch_sums(ys, g, norms, mean, r, scale, bias, outputs, eps: float, activation: str, negative_slope: float) -> None:
    """As many sums as there are outputs: without g those of `squeeze`, with g those of `select_backward_sums`."""
    y, M, sums = ys[0], len(ys), len(outputs)
    B, C, H, W = y.shape
    arguments = tuple(ys), g, norms, mean, r, scale, bias, outputs
    together = 1 if g is None else M
    if is_channels_last(y):
        parts = _parts_of_image(y, sums)
        block = _sums_channels_last_block(y, 1 if g is None else M + 1, B * parts * M // together)
        grid = (B * parts * (M // together) * ceil_div(C, block["CHANNELS"]),)
        kernel, sizes = _squeeze_channels_last_kernel, (parts, C // block["VECTOR"], H * W, ceil_div(H * W, parts))
    else:
        block = _sums_contiguous_block(y, together)
        grid, sizes = (ceil_div(B * C, block["ROWS"]) * (M // together),), (B, C, H * W)
        kernel = _squeeze_contiguous_kernel
    kernel[grid](*arguments, *sizes, eps, negative_slope, ACTIVATION=activation, SUMS=sums, **block, num_warps=WARPS)


def squeeze(ys, norm_weights, norm_biases, means, variances, eps: float, activation: str, negative_slope: float, sums: int):
    """mean, r, scale, bias, pooled, of every branch's parts, and, with three `sums`, [K1, K2]: see sk_fused/backends/reference.py.

    Floor: every branch is read once; all else is of the size of a descriptor. The batch-norms are folded by the programs that
    use them, from their own few channels: no launch for it."""
    y, M = ys[0], len(ys)
    B, C = y.shape[:2]
    dtype = accumulate_dtype(y.dtype)
    mean, r, scale, bias = (torch.empty((M, C), dtype=dtype, device=y.device) for _ in range(4))
    pooled = torch.empty((B, pooled_parts(ys, sums), C), dtype=dtype, device=y.device)
    K = [torch.empty((B, M, C), dtype=dtype, device=y.device) for _ in range(sums - 1)]
    norms = dense(norm_weights), dense(norm_biases), dense(means), dense(variances)
    _launch_sums(ys, None, norms, mean, r, scale, bias, (pooled, *K), eps, activation, negative_slope)
    return mean, r, scale, bias, pooled, K


def select_backward_sums(g, ys, mean, scale, bias, activation: str, negative_slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """da, R1, R2: the same sums, weighted by g.

    Floor: g and every branch are read once."""
    B, (M, C) = g.shape[0], mean.shape
    sums = tuple(torch.empty((B, M, C), dtype=mean.dtype, device=g.device) for _ in range(3))
    _launch_sums(ys, g, None, mean, None, scale, bias, sums, 0.0, activation, negative_slope)
    return sums


@triton.jit
def _add_deviations(total, squares, values, shift, inside, AXIS: tl.constexpr):
    """total + Σ d and squares + Σ d² over the AXIS, d = values − shift where `inside`; everywhere, if that is None."""
    d = values - shift
    if inside is not None:
        d = tl.where(inside, d, 0.0)
    return total + tl.sum(d, AXIS), squares + tl.sum(d * d, AXIS)


@triton.jit
def _store_partials(partials, part, channel, exists, channels, shift, total, squares, count):
    """Of the `count` values that one program has seen of every channel: the shift, the mean's distance from it, and the sum of
    the squared distances from the mean; to `partials`, (parts, 3, M·C)."""
    delta = total / count
    squares -= total * delta
    at = partials + part * 3 * channels + channel
    tl.store(at, shift, exists)
    tl.store(at + channels, delta, exists)
    # Rounding may take it below 0, where all values are the same; NaN stays.
    tl.store(at + 2 * channels, tl.where(squares < 0, 0.0, squares), exists)


@triton.jit(do_not_specialize=["B", "C", "pixels", "part_images"])
def _statistics_contiguous_kernel(
    ys, partials, B, C, pixels, part_images, VECTOR: tl.constexpr, STRADDLES: tl.constexpr, ROWS: tl.constexpr, VECTORS: tl.constexpr
):  # fmt: skip
    """A program: of ROWS channels of one branch the `partials`, (parts, 3, M·C), of a part of the batch, `part_images` images, VECTORS
    vectors of each channel at a time."""
    A: tl.constexpr = partials.dtype.element_ty
    M: tl.constexpr = len(ys)
    blocks = tl.cdiv(C, ROWS)
    m = tl.program_id(0) // blocks % M
    part = tl.program_id(0) // blocks // M
    y = of_branch(ys, m)
    c = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    exists = c < C
    b = part * part_images
    images = tl.minimum(part_images, B - b)
    # Tiles to an image: as many as its longest window has.
    if STRADDLES:
        tiles = tl.cdiv((pixels + 2 * VECTOR - 2) // VECTOR, VECTORS)
    else:
        tiles = tl.cdiv(pixels // VECTOR, VECTORS)
    first, count, lead = _window(b.to(tl.int64) * C + c, exists, pixels, VECTOR, STRADDLES)
    offsets, read, inside = _row_tile(first, count, lead, tl.arange(0, VECTORS), pixels, VECTOR, STRADDLES)
    values = tl.load(y + offsets, read, 0.0).to(A)
    seen = tl.sum(tl.sum(tl.where(inside, 1.0, 0.0).to(A), 2), 1)
    shift = tl.sum(tl.sum(tl.where(inside, values, 0.0), 2), 1) / tl.maximum(seen, 1.0)
    total, squares = tl.zeros((ROWS, VECTORS), A), tl.zeros((ROWS, VECTORS), A)
    total, squares = _add_deviations(total, squares, values, shift[:, None, None], inside, 2)
    for tile in range(1, images * tiles):
        image = tile // tiles
        first, count, lead = _window((b + image).to(tl.int64) * C + c, exists, pixels, VECTOR, STRADDLES)
        vector = (tile - image * tiles) * VECTORS + tl.arange(0, VECTORS)
        offsets, read, inside = _row_tile(first, count, lead, vector, pixels, VECTOR, STRADDLES)
        values = tl.load(y + offsets, read, 0.0).to(A)
        total, squares = _add_deviations(total, squares, values, shift[:, None, None], inside, 2)
    seen = images.to(A) * pixels.to(A)
    _store_partials(partials, part, m * C + c, exists, M * C, shift, tl.sum(total, 1), tl.sum(squares, 1), seen)


@triton.jit(do_not_specialize=["pixels", "vectors", "part_pixels"])
def _statistics_channels_last_kernel(
    ys, partials, pixels, vectors, part_pixels, VECTOR: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program: of CHANNELS channels of one branch the `partials`, (parts, 3, M·C), of a part of the batch, `part_pixels` of its pixels,
    UNROLL·PIXELS at a time. Here `pixels` are those of all images."""
    A: tl.constexpr = partials.dtype.element_ty
    M: tl.constexpr = len(ys)
    STEP: tl.constexpr = UNROLL * PIXELS
    C = vectors * VECTOR
    blocks = tl.cdiv(C, CHANNELS)
    m = tl.program_id(0) // blocks % M
    part = tl.program_id(0) // blocks // M
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    exists = c // VECTOR < vectors
    offsets, tile = _pixel_tile(c, vectors, VECTOR, UNROLL, PIXELS)
    read = exists[None, None, :]
    # The pixels of all images may need 64 bits; those of a part do not.
    start = part.to(tl.int64) * part_pixels
    count = tl.minimum(pixels - start, part_pixels).to(tl.int32)
    y = of_branch(ys, m)
    values = tl.load(y + start * vectors * VECTOR + offsets, read & (tile < count), 0.0).to(A)
    shift = tl.sum(tl.sum(values, 0), 0) / tl.minimum(count, STEP).to(A)
    total, squares = tl.zeros((PIXELS, CHANNELS), A), tl.zeros((PIXELS, CHANNELS), A)
    total, squares = _add_deviations(total, squares, values, shift[None, None, :], tile < count, 0)
    whole = count - count % STEP
    for pixel in tl.range(STEP, whole, STEP, num_stages=STAGES):
        values = tl.load(y + (start + pixel) * vectors * VECTOR + offsets, read, 0.0).to(A)
        total, squares = _add_deviations(total, squares, values, shift[None, None, :], None, 0)
    # What is left, if any: only it needs a mask.
    for pixel in range(tl.maximum(whole, STEP), count, STEP):
        inside = tile < count - pixel
        values = tl.load(y + (start + pixel) * vectors * VECTOR + offsets, read & inside, 0.0).to(A)
        total, squares = _add_deviations(total, squares, values, shift[None, None, :], inside, 0)
    _store_partials(partials, part, m * C + c, exists, M * C, shift, tl.sum(total, 0), tl.sum(squares, 0), count.to(A))


@triton.jit
def _load_partials(partials, part, channel, origin, channels, count, part_count):
    """Of the parts with these numbers, of which there may be fewer: how many counts each is of, the distance of its mean from the origin, and
    its squared distances from that mean."""
    exists = (part < tl.cdiv(count, part_count)) & (channel < channels)
    at = partials + part * 3 * channels + channel
    n = tl.where(exists, tl.minimum(part_count, count - part.to(tl.int64) * part_count), 0).to(origin.dtype)
    shift, delta = tl.load(at, exists, 0.0), tl.load(at + channels, exists, 0.0)
    # Shifts are close to each other: their differences are exact.
    return n, tl.where(exists, shift - origin + delta, 0.0), tl.load(at + 2 * channels, exists, 0.0)


@triton.jit(do_not_specialize=["channels", "count", "part_count", "weight"])
def _statistics_kernel(partials, mean, var, channels, count, part_count, weight, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program: mean and variance of CHANNELS of all branches' `channels`, M·C, from the partials, (parts, 3, M·C), of PARTS parts at most.

    A part is of part_count of `count` images or pixels, the last one of what is left; an image stands for `weight` values, its pixels'."""
    A: tl.constexpr = partials.dtype.element_ty
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)[:, None]
    origin = tl.load(partials + channel, channel < channels, 0.0)
    n, distance, squares = _load_partials(partials, part, channel[None, :], origin[None, :], channels, count, part_count)
    between = tl.sum(distance * n, 0) / count.to(A)
    deviation = distance - between[None, :]
    total = tl.sum(squares + n * weight.to(A) * deviation * deviation, 0)
    tl.store(mean + channel, origin + between, channel < channels)
    tl.store(var + channel, total / (count.to(A) * weight.to(A)), channel < channels)


def _parts_of_batch(programs: int) -> int:
    """Into how many parts the batch is cut for so many programs to each: twice enough, since the last to end are waited for."""
    return min(_MOST_PARTS, ceil_div(2 * ENOUGH_PROGRAMS, programs))


def branch_statistics(ys) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every branch's channels over (B, H, W), each (M, C).

    First the parts of the batch, each by the sums of its distances from a shift, then their union, by the rule of Chan,
    Golub and LeVeque. The shift is the mean of the part's first tile: whatever the data, its square is at most the variance
    times the part's share of tiles, which bounds what cancels; a single value, as a shift, may be an outlier.

    Floor: every branch is read once."""
    y, M = ys[0], len(ys)
    B, C, H, W = y.shape
    dtype = accumulate_dtype(y.dtype)
    if is_channels_last(y):
        # A program sees one branch only.
        block = _sums_channels_last_block(y, 1, ENOUGH_PROGRAMS)
        tile = block["UNROLL"] * block["PIXELS"]
        programs, count, weight = M * ceil_div(C, block["CHANNELS"]), B * H * W, 1
        part_count = ceil_div(ceil_div(count, _parts_of_batch(programs)), tile) * tile
        kernel, sizes = _statistics_channels_last_kernel, (count, C // block["VECTOR"], part_count)
    else:
        block = _sums_contiguous_block(y, 1)
        programs, count, weight = M * ceil_div(C, block["ROWS"]), B, H * W
        part_count = ceil_div(B, _parts_of_batch(programs))
        kernel, sizes = _statistics_contiguous_kernel, (B, C, H * W, part_count)
    parts = ceil_div(count, part_count)
    partials = torch.empty((parts, 3, M, C), dtype=dtype, device=y.device)
    kernel[(programs * parts,)](tuple(ys), partials, *sizes, **block, num_warps=WARPS)
    mean, var = (torch.empty((M, C), dtype=dtype, device=y.device) for _ in range(2))
    # A program has all parts of a few channels in its registers, read at once.
    channels = 4
    grid = (ceil_div(M * C, channels),)
    _statistics_kernel[grid](partials, mean, var, M * C, count, part_count, weight, PARTS=_MOST_PARTS, CHANNELS=channels, num_warps=WARPS)
    return mean, var


@triton.jit(do_not_specialize=["B", "C", "pixels", "count"])
def _fold_backward_kernel(
    a, ds, R1, R2, K1, K2, r, scale, t, dweight, dbias, p, q, B, C, pixels, count, M: tl.constexpr, IMAGES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A program: CHANNELS channels of dweight, dbias, p and q of one branch, from its a, R1, R2, K1 and K2 and from ds, IMAGES images at a
    time; those of the first branch write t."""
    A: tl.constexpr = t.dtype.element_ty
    m = tl.program_id(0) % M
    c = tl.program_id(0) // M * CHANNELS + tl.arange(0, CHANNELS)
    first, second = tl.zeros((IMAGES, CHANNELS), A), tl.zeros((IMAGES, CHANNELS), A)
    for image in range(0, B, IMAGES):
        b = (image + tl.arange(0, IMAGES))[:, None].to(tl.int64)
        exists = (b < B) & (c < C)[None, :]
        share = tl.load(ds + b * C + c[None, :], exists, 0.0) / pixels.to(A)
        tl.store(t + b * C + c[None, :], share, exists & (m == 0))
        at = (b * M + m) * C + c[None, :]
        weight = tl.load(a + at, exists, 0.0)
        first += weight * tl.load(R1 + at, exists, 0.0) + share * tl.load(K1 + at, exists, 0.0)
        second += weight * tl.load(R2 + at, exists, 0.0) + share * tl.load(K2 + at, exists, 0.0)
    at = m * C + c
    exists = c < C
    c_r = tl.load(r + at, exists, 0.0)
    shift, gain = tl.sum(first, 0), c_r * tl.sum(second, 0)
    tl.store(dbias + at, shift, exists)
    tl.store(dweight + at, gain, exists)
    owed = tl.zeros((CHANNELS,), A)
    if count != 0:
        owed = tl.load(scale + at, exists, 0.0) / count.to(A)
    tl.store(p + at, owed * shift, exists)
    tl.store(q + at, owed * c_r * gain, exists)


def fold_backward(a, ds, pixels: int, R1, R2, K1, K2, r, scale, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """t, dweight, dbias, p and q: see sk_fused/backends/reference.py. On (B, M, C)-sized data: no branch is read."""
    B, M, C = a.shape
    t = torch.empty_like(ds)
    dweight, dbias, p, q = (torch.empty_like(r) for _ in range(4))
    arrays = a, ds, R1, R2, K1, K2, r, scale, t, dweight, dbias, p, q
    # 64 bytes of neighbouring channels, and so many programs as there can be with them; of the images as many as registers hold, for
    # every step waits for memory.
    channels, warps = 16, 2 * WARPS
    grid = (M * ceil_div(C, channels),)
    _fold_backward_kernel[grid](*arrays, B, C, pixels, count, M=M, IMAGES=8 * 32 * warps // channels, CHANNELS=channels, num_warps=warps)
    return t, dweight, dbias, p, q
