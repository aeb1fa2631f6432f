"""attend: a = softmax_m(fc_select · act(BN(fc_reduce · s)) + select_bias) on (B, C)-sized data, and its backward.

Every product is summed in IEEE float32 (float64 for float64), never in tf32: a few thousand multiplications for each image
decide how whole branches are weighted. What one launch needs of the whole batch, its mean and variance, it takes from `partials`,
(parts, 2, D), that the launch before has left: two numbers of every reduced channel for each block of IMAGES images, a part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import ENOUGH_PROGRAMS, WARPS, activate, ceil_div, dense, gate, power_of_two

# Of a tile: images, reduced channels, and what is summed over at a time.
IMAGES, REDUCED, DEPTH = 16, 32, 32

# Of a long sum, taken at once, one by each warp.
SLICES = 8

# Logits of an image in a tile.
LOGITS = 64


@triton.jit
def _batch_norm(weight, bias, d, exists, A: tl.constexpr):
    """weight and bias of the channels d, 1 and 0 where the batch-norm has none."""
    gain, shift = tl.full(d.shape, 1.0, A), tl.zeros(d.shape, A)
    if weight is not None:
        gain = tl.load(weight + d, exists, 0.0).to(A)
    if bias is not None:
        shift = tl.load(bias + d, exists, 0.0).to(A)
    return gain, shift


@triton.jit
def _reduced_tile(
    pooled, s, fc_reduce, b, d, B, P, C, D, pixels, writes, SLICES: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """fc_reduce · s of the images b and reduced channels d, (images, reduced channels), from `pooled`, (B, P, C); s is written if `writes`.

    Every step is of SLICES products, one for each warp: as many channels are on their way at once, and steps, each of which
    waits for memory, are few."""
    A: tl.constexpr = s.dtype.element_ty
    reduced = tl.zeros((SLICES, b.shape[0], d.shape[0]), A)
    for start in range(0, C, SLICES * DEPTH):
        c = start + tl.arange(0, SLICES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
        exists = (b < B)[None, :, None] & (c < C)[:, None, :]
        is_weight = (d < D)[None, None, :] & (c < C)[:, :, None]
        matrix = tl.load(fc_reduce + d[None, None, :] * C + c[:, :, None], is_weight, 0.0).to(A)
        total = tl.zeros(exists.shape, A)
        # Two at once: there are mostly as many.
        for part in range(0, P, 2):
            at = pooled + (b * P + part)[None, :, None] * C + c[:, None, :]
            first, second = tl.load(at, exists, 0.0), tl.load(at + C, exists & (part + 1 < P), 0.0)
            total += first + second
        total = total / pixels.to(A)
        tl.store(s + b[None, :, None] * C + c[:, None, :], total, exists & writes)
        reduced = tl.dot(total, matrix, reduced, input_precision="ieee", out_dtype=A)
    return tl.sum(reduced, 0)


@triton.jit(do_not_specialize=["B", "P", "C", "D", "pixels"])
def _attend_reduce_kernel(
    pooled, s, reduced, partials, fc_reduce, B, P, C, D, pixels, IMAGES: tl.constexpr, REDUCED: tl.constexpr, SLICES: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A program: `reduced`, (B, D), of IMAGES images and REDUCED channels, and in `partials` the mean of these images and Σ of the squared
    distances from it. It reads all of the images' `pooled`, (B, P, C), and of fc_reduce its rows; those of the first block of channels write s."""
    A: tl.constexpr = s.dtype.element_ty
    blocks = tl.cdiv(D, REDUCED)
    part = tl.program_id(0) // blocks
    b = (part * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    d = tl.program_id(0) % blocks * REDUCED + tl.arange(0, REDUCED)
    tile = _reduced_tile(pooled, s, fc_reduce, b, d, B, P, C, D, pixels, tl.program_id(0) % blocks == 0, SLICES, DEPTH)
    tl.store(reduced + b[:, None] * D + d[None, :], tile, (b < B)[:, None] & (d < D)[None, :])
    count = tl.minimum(IMAGES, B - part * IMAGES).to(A)
    mean = tl.sum(tile, 0) / count
    deviation = tl.where((b < B)[:, None], tile - mean[None, :], 0.0)
    tl.store(partials + part * 2 * D + d, mean, d < D)
    tl.store(partials + (part * 2 + 1) * D + d, tl.sum(deviation * deviation, 0), d < D)


@triton.jit
def _joined(partials, d, B, D, IMAGES: tl.constexpr, PARTS: tl.constexpr, A: tl.constexpr):
    """Mean and biased variance of the reduced channels d over the batch, from those of its parts, of IMAGES images each."""
    parts = tl.cdiv(B, IMAGES)
    total = tl.zeros((PARTS, d.shape[0]), A)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        n = tl.minimum(IMAGES, B - part * IMAGES).to(A)
        total += n * tl.load(partials + part * 2 * D + d[None, :], (part < parts) & (d < D)[None, :], 0.0)
    mean = tl.sum(total, 0) / B.to(A)
    squares = tl.zeros((PARTS, d.shape[0]), A)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        exists = (part < parts) & (d < D)[None, :]
        deviation = tl.load(partials + part * 2 * D + d[None, :], exists, 0.0) - mean[None, :]
        within = tl.load(partials + (part * 2 + 1) * D + d[None, :], exists, 0.0)
        squares += tl.where(exists, within + tl.minimum(IMAGES, B - part * IMAGES).to(A) * deviation * deviation, 0.0)
    return mean, tl.sum(squares, 0) / B.to(A)


@triton.jit(do_not_specialize=["B", "P", "C", "D", "M", "pixels"])
def _attend_kernel(
    pooled, s, reduced, partials, fc_reduce, weight, bias, given_mean, given_var, mean, var, fc_select, select_bias, a, B, P, C, D, M, pixels,
    eps: tl.constexpr, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr, IMAGES: tl.constexpr, REDUCED: tl.constexpr, SLICES: tl.constexpr,
    DEPTH: tl.constexpr, BRANCHES: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program: a of IMAGES images and CHANNELS channels of all branches; BRANCHES is the power of two that holds them.

    With given statistics it makes the reduced descriptor of its images itself, and those of the first block of channels write s and
    `reduced`, (B, D); else it reads `reduced` and joins the statistics of the batch's parts, PARTS at a time. It reads its own rows of
    fc_select. The first program writes the mean and var used, (D,)."""
    A: tl.constexpr = s.dtype.element_ty
    blocks = tl.cdiv(C, CHANNELS)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b = (part * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    logit = tl.arange(0, BRANCHES * CHANNELS)
    m, c = logit // CHANNELS, block * CHANNELS + logit % CHANNELS
    row, is_logit = m * C + c, (m < M) & (c < C)
    logits = tl.zeros((IMAGES, BRANCHES * CHANNELS), A)
    if select_bias is not None:
        logits += tl.load(select_bias + row, is_logit, 0.0).to(A)[None, :]
    for start in range(0, D, REDUCED):
        d = start + tl.arange(0, REDUCED)
        exists = (b < B)[:, None] & (d < D)[None, :]
        if given_mean is not None:
            tile = _reduced_tile(pooled, s, fc_reduce, b, d, B, P, C, D, pixels, (block == 0) & (start == 0), SLICES, DEPTH)
            tl.store(reduced + b[:, None] * D + d[None, :], tile, exists & (block == 0))
            d_mean, d_var = tl.load(given_mean + d, d < D, 0.0).to(A), tl.load(given_var + d, d < D, 1.0).to(A)
        else:
            tile = tl.load(reduced + b[:, None] * D + d[None, :], exists, 0.0)
            d_mean, d_var = _joined(partials, d, B, D, IMAGES, PARTS, A)
        first = (d < D) & (block == 0) & (part == 0)
        tl.store(mean + d, d_mean, first)
        tl.store(var + d, d_var, first)
        gain, shift = _batch_norm(weight, bias, d, d < D, A)
        hidden = activate((tile - d_mean[None, :]) * (tl.rsqrt(d_var + eps) * gain)[None, :] + shift[None, :], negative_slope, ACTIVATION)
        hidden = tl.where(exists, hidden, 0.0)
        matrix = tl.load(fc_select + row[None, :].to(tl.int64) * D + d[:, None], is_logit[None, :] & (d < D)[:, None], 0.0).to(A)
        logits = tl.dot(hidden, matrix, logits, input_precision="ieee", out_dtype=A)
    logits = tl.where((m < M)[None, :], logits, float("-inf")).reshape((IMAGES, BRANCHES, CHANNELS))
    e = tl.exp(logits - tl.max(logits, 1)[:, None, :])
    weights = (e / tl.sum(e, 1)[:, None, :]).reshape((IMAGES, BRANCHES * CHANNELS))
    tl.store(a + (b * M)[:, None] * C + row[None, :], weights, (b < B)[:, None] & is_logit[None, :])


# Of the batch's statistics, read at a time.
_PARTS = 16


def attend(
    pooled, pixels: int, fc_reduce, weight, bias, mean, var, eps: float, activation: str, negative_slope: float, fc_select, select_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a, s, the reduced descriptor and the mean and variance used: see sk_fused/backends/reference.py.

    One launch with given statistics, two with those of the batch. No branch is read: what counts is that a program reads
    little of the weights again, and that there are programs enough."""
    B, P, C = pooled.shape
    D, M = fc_reduce.shape[0], fc_select.shape[0] // C
    a, s, reduced = pooled.new_empty((B, M, C)), pooled.new_empty((B, C)), pooled.new_empty((B, D))
    used_mean, used_var = pooled.new_empty((D,)), pooled.new_empty((D,))
    blocks = ceil_div(B, IMAGES)
    partials = None
    fc_reduce, fc_select, weight, bias, mean, var, select_bias = dense((fc_reduce, fc_select, weight, bias, mean, var, select_bias))
    if mean is None:
        partials = pooled.new_empty((blocks, 2, D))
        grid = (blocks * ceil_div(D, REDUCED),)
        _attend_reduce_kernel[grid](
            pooled, s, reduced, partials, fc_reduce, B, P, C, D, pixels, IMAGES=IMAGES, REDUCED=REDUCED, SLICES=SLICES, DEPTH=DEPTH,
            num_warps=SLICES,
        )  # fmt: skip
    branches = power_of_two(M)
    channels, images, depth, warps = ceil_div(LOGITS, branches), IMAGES, DEPTH, WARPS
    if mean is not None:
        # Every program makes the whole reduced descriptor of its images: as few of them as still busy the GPU.
        images, depth, warps = IMAGES // 2, DEPTH // 2, SLICES
        blocks = ceil_div(B, images)
        while channels < 4 * ceil_div(LOGITS, branches) and blocks * ceil_div(C, 2 * channels) >= ENOUGH_PROGRAMS // 4:
            channels *= 2
    _attend_kernel[(blocks * ceil_div(C, channels),)](
        pooled, s, reduced, partials, fc_reduce, weight, bias, mean, var, used_mean, used_var, fc_select, select_bias, a, B, P, C, D, M, pixels,
        eps, negative_slope, ACTIVATION=activation, IMAGES=images, REDUCED=REDUCED, SLICES=SLICES, DEPTH=depth, BRANCHES=branches,
        CHANNELS=channels, PARTS=_PARTS, num_warps=warps,
    )  # fmt: skip
    return a, s, reduced, used_mean, used_var


@triton.jit
def _logit_rows(first, C, M, BLOCKS: tl.constexpr, BRANCHES: tl.constexpr, CHANNELS: tl.constexpr):
    """Of blocks of channels, from the one numbered `first` on: the rows of fc_select, all branches of a block beside each other, and
    which there are."""
    logit = tl.arange(0, BLOCKS * BRANCHES * CHANNELS)
    m, c = logit // CHANNELS % BRANCHES, (first + logit // (BRANCHES * CHANNELS)) * CHANNELS + logit % CHANNELS
    return m * C + c, (m < M) & (c < C)


@triton.jit
def _dlogits_tile(da, a, b, row, is_logit, B, C, M, BRANCHES: tl.constexpr, CHANNELS: tl.constexpr):
    """a·(da − Σ_m a·da) of the images b and rows of `_logit_rows`, (images, rows)."""
    at = (b * M)[:, None] * C + row[None, :]
    exists = (b < B)[:, None] & is_logit[None, :]
    shape: tl.constexpr = (b.shape[0], row.shape[0] // (BRANCHES * CHANNELS), BRANCHES, CHANNELS)
    weights = tl.load(a + at, exists, 0.0).reshape(shape)
    gradient = tl.load(da + at, exists, 0.0).reshape(shape)
    dlogits = weights * (gradient - tl.sum(weights * gradient, 2)[:, :, None, :])
    return dlogits.reshape((b.shape[0], row.shape[0]))


@triton.jit
def _normalized(reduced, mean, var, weight, bias, b, d, B, D, eps: tl.constexpr, A: tl.constexpr):
    """Of the images b and reduced channels d: the normalized descriptor and what the batch-norm makes of it, zeros where there is
    none; and weight/√(var + eps)."""
    r = tl.rsqrt(tl.load(var + d, d < D, 1.0) + eps)
    gain, shift = _batch_norm(weight, bias, d, d < D, A)
    exists = (b < B)[:, None] & (d < D)[None, :]
    x = tl.load(reduced + b[:, None] * D + d[None, :], exists, 0.0) - tl.load(mean + d, d < D, 0.0)[None, :]
    x = tl.where(exists, x * r[None, :], 0.0)
    return x, tl.where(exists, x * gain[None, :] + shift[None, :], 0.0), gain * r


@triton.jit(do_not_specialize=["B", "C", "D", "M"])
def _attend_backward_reduce_kernel(
    da, a, reduced, weight, bias, mean, var, fc_select, dn, partials, B, C, D, M, eps: tl.constexpr, negative_slope: tl.constexpr,
    ACTIVATION: tl.constexpr, IMAGES: tl.constexpr, REDUCED: tl.constexpr, SLICES: tl.constexpr, BRANCHES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program: dn, (B, D), the gradient after the batch-norm, of IMAGES images and REDUCED channels, and in `partials` their sums Σ dn and
    Σ dn·x over these images, x being the normalized descriptor. It reads da and a of its images, and REDUCED columns of fc_select."""
    A: tl.constexpr = dn.dtype.element_ty
    blocks = tl.cdiv(D, REDUCED)
    part = tl.program_id(0) // blocks
    b = (part * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    d = tl.program_id(0) % blocks * REDUCED + tl.arange(0, REDUCED)
    ROWS: tl.constexpr = BRANCHES * CHANNELS
    total = tl.zeros((SLICES, IMAGES, REDUCED), A)
    for block in range(0, tl.cdiv(C, CHANNELS), SLICES):
        row, is_logit = _logit_rows(block, C, M, SLICES, BRANCHES, CHANNELS)
        matrix = tl.load(fc_select + row[:, None].to(tl.int64) * D + d[None, :], is_logit[:, None] & (d < D)[None, :], 0.0).to(A)
        dlogits = _dlogits_tile(da, a, b, row, is_logit, B, C, M, BRANCHES, CHANNELS).reshape((IMAGES, SLICES, ROWS)).permute((1, 0, 2))
        total = tl.dot(dlogits, matrix.reshape((SLICES, ROWS, REDUCED)), total, input_precision="ieee", out_dtype=A)
    gradient = tl.sum(total, 0)
    x, n, factor = _normalized(reduced, mean, var, weight, bias, b, d, B, D, eps, A)
    gradient = gate(n, gradient, negative_slope, ACTIVATION)
    exists = (b < B)[:, None] & (d < D)[None, :]
    gradient = tl.where(exists, gradient, 0.0)
    tl.store(dn + b[:, None] * D + d[None, :], gradient, exists)
    tl.store(partials + part * 2 * D + d, tl.sum(gradient, 0), d < D)
    tl.store(partials + (part * 2 + 1) * D + d, tl.sum(gradient * x, 0), d < D)


@triton.jit
def _total(partials, d, parts, D, PARTS: tl.constexpr, A: tl.constexpr):
    """Σ over the parts of the batch of their two sums, of the reduced channels d."""
    first, second = tl.zeros((PARTS, d.shape[0]), A), tl.zeros((PARTS, d.shape[0]), A)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        exists = (part < parts) & (d < D)[None, :]
        first += tl.load(partials + part * 2 * D + d[None, :], exists, 0.0)
        second += tl.load(partials + (part * 2 + 1) * D + d[None, :], exists, 0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _dreduced_tile(
    dn, reduced, mean, var, weight, bias, b, d, B, D, dbias, dweight, eps: tl.constexpr, TRAINING: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """The gradient of the reduced descriptor, of the images b and channels d, (images, reduced channels)."""
    x, n, factor = _normalized(reduced, mean, var, weight, bias, b, d, B, D, eps, A)
    exists = (b < B)[:, None] & (d < D)[None, :]
    gradient = tl.load(dn + b[:, None] * D + d[None, :], exists, 0.0)
    if TRAINING:
        gradient -= (dbias / B.to(A))[None, :] + x * (dweight / B.to(A))[None, :]
    return tl.where(exists, gradient * factor[None, :], 0.0)


@triton.jit
def _ds_block(
    program, norm, fc_reduce, ds, B, C, D, eps: tl.constexpr, TRAINING: tl.constexpr, IMAGES: tl.constexpr, REDUCED: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ds of IMAGES images and COLUMNS channels."""
    dn, partials, reduced, mean, var, weight, bias = norm
    A: tl.constexpr = ds.dtype.element_ty
    blocks = tl.cdiv(C, COLUMNS)
    b = (program // blocks * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)
    c = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((IMAGES, COLUMNS), A)
    for start in range(0, D, REDUCED):
        d = start + tl.arange(0, REDUCED)
        dbias, dweight = _total(partials, d, tl.cdiv(B, IMAGES), D, PARTS, A)
        tile = _dreduced_tile(dn, reduced, mean, var, weight, bias, b, d, B, D, dbias, dweight, eps, TRAINING, A)
        matrix = tl.load(fc_reduce + d[:, None] * C + c[None, :], (d < D)[:, None] & (c < C)[None, :], 0.0).to(A)
        total = tl.dot(tile, matrix, total, input_precision="ieee", out_dtype=A)
    tl.store(ds + b[:, None] * C + c[None, :], total, (b < B)[:, None] & (c < C)[None, :])


@triton.jit
def _dreduce_block(
    program, norm, s, dfc_reduce, dweight, dbias, B, C, D, eps: tl.constexpr, TRAINING: tl.constexpr, IMAGES: tl.constexpr,
    REDUCED: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dfc_reduce of REDUCED rows and COLUMNS channels; the first of a row's blocks writes the gradients of its batch-norm."""
    dn, partials, reduced, mean, var, weight, bias = norm
    A: tl.constexpr = s.dtype.element_ty
    blocks = tl.cdiv(C, COLUMNS)
    d = program // blocks * REDUCED + tl.arange(0, REDUCED)
    c = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    first, second = _total(partials, d, tl.cdiv(B, IMAGES), D, PARTS, A)
    total = tl.zeros((SLICES, REDUCED, COLUMNS), A)
    for start in range(0, B, SLICES * IMAGES):
        b = (start + tl.arange(0, SLICES * IMAGES)).to(tl.int64)
        tile = _dreduced_tile(dn, reduced, mean, var, weight, bias, b, d, B, D, first, second, eps, TRAINING, A)
        descriptor = tl.load(s + b[:, None] * C + c[None, :], (b < B)[:, None] & (c < C)[None, :], 0.0)
        tile, descriptor = tile.reshape((SLICES, IMAGES, REDUCED)), descriptor.reshape((SLICES, IMAGES, COLUMNS))
        total = tl.dot(tile.permute((0, 2, 1)), descriptor, total, input_precision="ieee", out_dtype=A)
    tl.store(dfc_reduce + d[:, None] * C + c[None, :], tl.sum(total, 0), (d < D)[:, None] & (c < C)[None, :])
    writes = (d < D) & (program % blocks == 0)
    tl.store(dbias + d, first, writes)
    tl.store(dweight + d, second, writes)


@triton.jit
def _dselect_block(
    program, norm, da, a, dfc_select, dselect_bias, B, C, D, M, eps: tl.constexpr, negative_slope: tl.constexpr, ACTIVATION: tl.constexpr,
    IMAGES: tl.constexpr, REDUCED: tl.constexpr, SLICES: tl.constexpr, BRANCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dfc_select of CHANNELS channels of all branches and REDUCED columns; the first of a row's blocks writes the bias's gradient."""
    dn, partials, reduced, mean, var, weight, bias = norm
    A: tl.constexpr = da.dtype.element_ty
    blocks = tl.cdiv(D, REDUCED)
    block = program // blocks
    d = program % blocks * REDUCED + tl.arange(0, REDUCED)
    ROWS: tl.constexpr = BRANCHES * CHANNELS
    row, exists = _logit_rows(block, C, M, 1, BRANCHES, CHANNELS)
    total, bias_total = tl.zeros((SLICES, ROWS, REDUCED), A), tl.zeros((ROWS,), A)
    for start in range(0, B, SLICES * IMAGES):
        b = (start + tl.arange(0, SLICES * IMAGES)).to(tl.int64)
        dlogits = _dlogits_tile(da, a, b, row, exists, B, C, M, BRANCHES, CHANNELS)
        x, n, factor = _normalized(reduced, mean, var, weight, bias, b, d, B, D, eps, A)
        hidden = activate(n, negative_slope, ACTIVATION).reshape((SLICES, IMAGES, REDUCED))
        bias_total += tl.sum(dlogits, 0)
        total = tl.dot(dlogits.reshape((SLICES, IMAGES, ROWS)).permute((0, 2, 1)), hidden, total, input_precision="ieee", out_dtype=A)
    tl.store(dfc_select + row[:, None].to(tl.int64) * D + d[None, :], tl.sum(total, 0), exists[:, None] & (d < D)[None, :])
    tl.store(dselect_bias + row, bias_total, exists & (program % blocks == 0))


@triton.jit(do_not_specialize=["B", "C", "D", "M"])
def _attend_backward_kernel(
    da, a, s, norm, fc_reduce, ds, dfc_reduce, dweight, dbias, dfc_select, dselect_bias, B, C, D, M, eps: tl.constexpr,
    negative_slope: tl.constexpr, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr, IMAGES: tl.constexpr, REDUCED: tl.constexpr,
    COLUMNS: tl.constexpr, SLICES: tl.constexpr, BRANCHES: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program: one block of ds, which is wider, of dfc_reduce or of dfc_select, none of which needs another. `norm`: dn, the partials, what
    was `reduced`, and mean, var, weight and bias of its batch-norm."""
    program = tl.program_id(0)
    of_ds = tl.cdiv(B, IMAGES) * tl.cdiv(C, 4 * COLUMNS)
    of_reduce = tl.cdiv(D, REDUCED) * tl.cdiv(C, COLUMNS)
    if program < of_ds:
        _ds_block(program, norm, fc_reduce, ds, B, C, D, eps, TRAINING, IMAGES, REDUCED, 4 * COLUMNS, PARTS)
    elif program < of_ds + of_reduce:
        program -= of_ds
        _dreduce_block(program, norm, s, dfc_reduce, dweight, dbias, B, C, D, eps, TRAINING, IMAGES, REDUCED, COLUMNS, SLICES, PARTS)
    else:
        program -= of_ds + of_reduce
        _dselect_block(
            program, norm, da, a, dfc_select, dselect_bias, B, C, D, M, eps, negative_slope, ACTIVATION,
            IMAGES, REDUCED, SLICES, BRANCHES, CHANNELS,
        )  # fmt: skip


def attend_backward(
    da, a, s, reduced, fc_reduce, weight, bias, mean, var, eps: float, training: bool, activation: str, negative_slope: float, fc_select
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of s, fc_reduce, weight, bias, fc_select and select_bias, in the dtype of s. Two launches: the gradient after
    the batch-norm, and, of the parts of the batch, its two sums; then all that rests on it."""
    B, M, C = a.shape
    D = reduced.shape[1]
    dn, ds = torch.empty_like(reduced), torch.empty_like(s)
    dfc_reduce, dfc_select = s.new_empty(fc_reduce.shape), s.new_empty(fc_select.shape)
    fc_reduce, fc_select, weight, bias = dense((fc_reduce, fc_select, weight, bias))
    dweight, dbias, dselect_bias = s.new_empty((D,)), s.new_empty((D,)), s.new_empty((M * C,))
    blocks = ceil_div(B, IMAGES)
    partials = s.new_empty((blocks, 2, D))
    branches = power_of_two(M)
    channels = ceil_div(LOGITS // 2, branches)
    tile = {"IMAGES": IMAGES, "REDUCED": REDUCED, "SLICES": SLICES, "BRANCHES": branches, "CHANNELS": channels, "num_warps": SLICES}
    # Steps are few, and what is on its way is much already.
    tile |= {"num_stages": 1}
    act = {"negative_slope": negative_slope, "ACTIVATION": activation}
    _attend_backward_reduce_kernel[(blocks * ceil_div(D, REDUCED),)](
        da, a, reduced, weight, bias, mean, var, fc_select, dn, partials, B, C, D, M, eps, **act, **tile
    )
    columns = LOGITS // 2
    of_ds, of_reduce = blocks * ceil_div(C, 4 * columns), ceil_div(D, REDUCED) * ceil_div(C, columns)
    grid = (of_ds + of_reduce + ceil_div(C, channels) * ceil_div(D, REDUCED),)
    norm = dn, partials, reduced, mean, var, weight, bias
    _attend_backward_kernel[grid](
        da, a, s, norm, fc_reduce, ds, dfc_reduce, dweight, dbias, dfc_select, dselect_bias, B, C, D, M, eps,
        **act, TRAINING=training, COLUMNS=columns, PARTS=_PARTS, **tile,
    )  # fmt: skip
    return ds, dfc_reduce, dweight, dbias, dfc_select, dselect_bias
