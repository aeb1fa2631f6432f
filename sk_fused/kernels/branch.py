"""The convolutions of the branches, y_m = w_m ∗ x_m, as implicit matrix products: all branches in one launch. The statistics of
branches that the library has convolved, `branch_statistics`, are in squeeze.py, with the other sums over pixels.

A program makes a tile of y_m, BLOCK_P pixels by BLOCK_N channels, in a loop over the blocks of input channels and, inside it,
the taps: what is read of x for one tap is still in a cache for the others. It keeps one offset a pixel, to which a tap adds a
number.

Groups are packed: a tile of channels covers as many whole groups as fit, and its matrix of weights is block-diagonal, with
zeros between the groups (so a NaN or an infinity spreads from a group to those of its tile). With one input channel a group
there is no matrix product.

The branches are beside each other in the grid, after them the tiles of channels: what reads the same pixels runs at the same
time, so x comes from memory once. A branch that sees its part of x reads it where it lies.

The kernels are for channels_last, where the input channels that a product adds up lie beside each other. In contiguous memory
a tap moves every pixel off its alignment, and a thread would read value by value, from hundreds of addresses that no register
holds (tried: over a kilobyte of them spilled); such convolutions are the library's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.reference import convolutions, convolutions_backward, empty_branch, layout_of, no_statistics
from . import choice
from .attend import attend
from .common import activate, dense, fold, is_channels_last, of_branch
from .select import select, select_backward
from .squeeze import branch_statistics, squeeze

T = TypeVar("T")

# The interpreter multiplies the bits of bfloat16, not its values.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Whatever these are, one kernel is compiled.
_SIZES = ("segment", "H", "W", "OH", "OW")


@triton.jit
def _constant(values: tl.constexpr, m):
    """`of_branch` of a tuple of constants; itself a constant if they are alike."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        if values[i] != values[0]:
            value = tl.where(m == i, values[i], value)
    return value


@triton.jit
def _program(M: tl.constexpr, GROUPS: tl.constexpr, OUTPUTS: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of this program: its branch; the number of its pack of groups; its channels, counted from the pack's first; and what is left of its
    own number."""
    BLOCKS: tl.constexpr = triton.cdiv(PACK * OUTPUTS, BLOCK_N)
    PACKS: tl.constexpr = triton.cdiv(GROUPS, PACK)
    program = tl.program_id(0)
    m, program = program % M, program // M
    block, program = program % BLOCKS, program // BLOCKS
    return m, program % PACKS, block * BLOCK_N + tl.arange(0, BLOCK_N), program // PACKS


@triton.jit
def _pixels(tile, segment, OH, OW, BLOCK_P: tl.constexpr):
    """Of a tile: its first image; of each of its BLOCK_P pixels the image, counted from that one, the row and the column; how many of these
    pixels there are.

    The pixels of all images are counted through. A segment is those of all images or of one, and begins a tile."""
    tiles = tl.cdiv(segment, BLOCK_P)
    within = (tile % tiles).to(tl.int64) * BLOCK_P
    first = (tile // tiles).to(tl.int64) * segment + within
    image = first // (OH * OW)
    pixel = (first - image * (OH * OW)).to(tl.int32) + tl.arange(0, BLOCK_P)
    rest = pixel % (OH * OW)
    return image, pixel // (OH * OW), rest // OW, rest % OW, tl.minimum(segment - within, BLOCK_P).to(tl.int32)


@triton.jit
def _convolve(
    x, w, image, images, row, column, count, n, pack, m, dilation, kernel, H, W,
    STRIDE: tl.constexpr, SPLIT: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of w ∗ x_m, (BLOCK_P, BLOCK_N) in float32: of the first `count` pixels, which are (images, row, column) of y from
    `image` on; the others are 0. SPLIT is 1 or, if x has a part for each branch, their number.

    Its channels are `n`, counted from the first of the groups of `pack`. Floor: 2 · kernel² · INPUTS flops a value; with packed
    groups it takes 2 · kernel² · BLOCK_K."""
    CHANNELS: tl.constexpr = SPLIT * GROUPS * INPUTS
    taps, reach = kernel * kernel, dilation * (kernel // 2)
    # Rows above every image, where there is no pixel.
    top, left = tl.where(tl.arange(0, BLOCK_P) < count, row * STRIDE, -(1 << 30)), column * STRIDE
    at_pixel = (images * (H * W) + row * STRIDE * W + left) * CHANNELS
    c = pack * (PACK * OUTPUTS) + n
    is_output = (n < PACK * OUTPUTS) & (c < GROUPS * OUTPUTS)
    w += c[None, :] * (taps * INPUTS)
    x += image * (H * W * CHANNELS)
    if SPLIT > 1:
        x += m * (GROUPS * INPUTS)
    if INPUTS == 1:
        x += (pack * PACK + n // OUTPUTS)[None, :]
    else:
        x += pack * (PACK * INPUTS)
    BLOCKS: tl.constexpr = 1 if INPUTS == 1 else triton.cdiv(PACK * INPUTS, BLOCK_K)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for i in range(taps * BLOCKS):
        tap = i if BLOCKS == 1 else i % taps
        down, right = tap // kernel * dilation - reach, tap % kernel * dilation - reach
        inside = (top + down >= 0) & (top + down < H) & (left + right >= 0) & (left + right < W)
        at = x + (at_pixel + (down * W + right) * CHANNELS)[:, None]
        if INPUTS == 1:
            a = tl.load(at, inside[:, None] & is_output[None, :], 0.0)
            b = tl.load(w + tap, is_output[None, :], 0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)
        else:
            k = (0 if BLOCKS == 1 else i // taps * BLOCK_K) + tl.arange(0, BLOCK_K)
            is_input = (k < PACK * INPUTS) & (pack * (PACK * INPUTS) + k < GROUPS * INPUTS)
            is_weight = is_input[:, None] & is_output[None, :]
            if PACK > 1:
                is_weight = is_weight & (k[:, None] // INPUTS == n[None, :] // OUTPUTS)
            if PACK * INPUTS % BLOCK_K == 0 and GROUPS % PACK == 0:
                a = tl.load(at + k[None, :], inside[:, None], 0.0)
            else:
                a = tl.load(at + k[None, :], inside[:, None] & is_input[None, :], 0.0)
            b = tl.load(w + (tap * INPUTS + k % INPUTS)[:, None], is_weight, 0.0)
            if _INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _at(image, images, row, column, c, OH, OW, C: tl.constexpr):
    """Where the channels c of the tile's pixels are in a branch."""
    return image * (OH * OW * C) + ((images * (OH * OW) + row * OW + column) * C)[:, None] + c[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _branch_kernel(
    x, ws, ys, partials, segment, H, W, OH, OW, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of y_m, from x and w_m, `_by_taps`; and of its channels, over the tile's pixels and as they are stored, the mean and
    Σ (y − mean)²: `partials`, (2, M, C, tiles). The segment is that of all images."""
    M: tl.constexpr = len(KERNELS)
    C: tl.constexpr = GROUPS * OUTPUTS
    m, pack, n, tile = _program(M, GROUPS, OUTPUTS, PACK, BLOCK_N)
    image, images, row, column, count = _pixels(tile, segment, OH, OW, BLOCK_P)
    acc = _convolve(
        x, of_branch(ws, m), image, images, row, column, count, n, pack, m, _constant(DILATIONS, m), _constant(KERNELS, m), H, W,
        STRIDE, SPLIT, GROUPS, INPUTS, OUTPUTS, PACK, BLOCK_P, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    c = pack * (PACK * OUTPUTS) + n
    is_channel, is_pixel = (n < PACK * OUTPUTS) & (c < C), tl.arange(0, BLOCK_P) < count
    y = acc.to(x.dtype.element_ty)
    tl.store(of_branch(ys, m) + _at(image, images, row, column, c, OH, OW, C), y, is_pixel[:, None] & is_channel[None, :])
    mean = tl.sum(y.to(tl.float32), 0) / count
    d = tl.where(is_pixel[:, None], y.to(tl.float32) - mean[None, :], 0.0)
    tiles = tl.cdiv(segment, BLOCK_P).to(tl.int64)
    at = partials + (m * C + c) * tiles + tile
    tl.store(at, mean, is_channel)
    tl.store(at + tiles * (M * C), tl.sum(d * d, 0), is_channel)


@triton.jit(do_not_specialize=("tiles", "pixels"))
def _moments_kernel(partials, mean, var, tiles, pixels, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """A program: mean and variance of one of the M·C channels from `partials`, (2, M, C, tiles), BLOCK tiles at a time. Tiles have BLOCK_P
    of all images' `pixels` each, the last what is left."""
    channel = tl.program_id(0)
    means = partials + channel.to(tl.int64) * tiles
    squares = means + tl.cast(tiles, tl.int64) * tl.num_programs(0)
    # Means are taken from the first tile's on, and squares from the mean: no digit is lost where it is far from 0.
    first = tl.load(means)
    away = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count = tl.minimum(pixels - tile.to(tl.int64) * BLOCK_P, BLOCK_P).to(tl.float32)
        away += tl.where(tile < tiles, count * (tl.load(means + tile, tile < tiles, 0.0) - first), 0.0)
    total = first + tl.sum(away, 0) / pixels
    spread = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count = tl.minimum(pixels - tile.to(tl.int64) * BLOCK_P, BLOCK_P).to(tl.float32)
        d = tl.load(means + tile, tile < tiles, 0.0) - total
        spread += tl.where(tile < tiles, tl.load(squares + tile, tile < tiles, 0.0) + count * d * d, 0.0)
    tl.store(mean + channel, total)
    tl.store(var + channel, tl.sum(spread, 0) / pixels)


@triton.jit(do_not_specialize=(*_SIZES, "parts"))
def _branch_squeeze_kernel(
    x, ws, ys, pooled, folded, weights, biases, means, variances, eps, parts, segment, H, W, OH, OW,
    negative_slope: tl.constexpr, ACTIVATION: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: of a block of channels of y_m every `parts`-th tile of an image: Σ u, to `pooled`, (B, M·parts, C).

    Where the branches are wanted, y_m goes to `ys`, and mean, scale and bias of the batch-norms to `folded`, (3, M, C), for the
    select."""
    M: tl.constexpr = len(KERNELS)
    C: tl.constexpr = GROUPS * OUTPUTS
    m, pack, n, program = _program(M, GROUPS, OUTPUTS, PACK, BLOCK_N)
    c = pack * (PACK * OUTPUTS) + n
    is_channel = (n < PACK * OUTPUTS) & (c < C)
    tiles = tl.cdiv(segment, BLOCK_P)
    at = program // parts * (M * parts) + m * parts + program % parts
    sums = pooled + at.to(tl.int64) * C + c
    for tile in range(program % parts, tiles, parts):
        image, images, row, column, count = _pixels(program // parts * tiles + tile, segment, OH, OW, BLOCK_P)
        acc = _convolve(
            x, of_branch(ws, m), image, images, row, column, count, n, pack, m, _constant(DILATIONS, m), _constant(KERNELS, m), H, W,
            STRIDE, SPLIT, GROUPS, INPUTS, OUTPUTS, PACK, BLOCK_P, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        y = acc.to(x.dtype.element_ty)
        is_pixel = tl.arange(0, BLOCK_P) < count
        if ys is not None:
            tl.store(of_branch(ys, m) + _at(image, images, row, column, c, OH, OW, C), y, is_pixel[:, None] & is_channel[None, :])
        # From memory for every tile, also the sums: they would be in registers all through the convolution.
        before = tl.load(sums, is_channel & (tile >= parts), 0.0)
        mean, r, scale, bias = fold((weights, biases, means, variances), eps, m, c, is_channel, tl.float32)
        u = activate((y.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :], negative_slope, ACTIVATION)
        tl.store(sums, before + tl.sum(tl.where(is_pixel[:, None], u, 0.0), 0), is_channel)
        # Another thread may read them.
        tl.debug_barrier()
    if folded is not None:
        if program == 0:
            mean, r, scale, bias = fold((weights, biases, means, variances), eps, m, c, is_channel, tl.float32)
            tl.store(folded + m * C + c, mean, is_channel)
            tl.store(folded + (M + m) * C + c, scale, is_channel)
            tl.store(folded + (2 * M + m) * C + c, bias, is_channel)


@triton.jit(do_not_specialize=_SIZES)
def _branch_select_kernel(
    x, ws, v, a, weights, biases, means, variances, eps, segment, H, W, OH, OW,
    negative_slope: tl.constexpr, ACTIVATION: tl.constexpr, KERNELS: tl.constexpr, DILATIONS: tl.constexpr, STRIDE: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    PACK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of v = Σ_m a_m·u_m, from x: the convolutions of all branches, one after the other. A segment is an image."""
    M: tl.constexpr = len(KERNELS)
    C: tl.constexpr = GROUPS * OUTPUTS
    _, pack, n, tile = _program(1, GROUPS, OUTPUTS, PACK, BLOCK_N)
    image, images, row, column, count = _pixels(tile, segment, OH, OW, BLOCK_P)
    c = pack * (PACK * OUTPUTS) + n
    is_channel = (n < PACK * OUTPUTS) & (c < C)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    # Not unrolled: the registers of one branch are enough for all.
    for m in range(M):
        acc = _convolve(
            x, of_branch(ws, m), image, images, row, column, count, n, pack, m, _constant(DILATIONS, m), _constant(KERNELS, m), H, W,
            STRIDE, SPLIT, GROUPS, INPUTS, OUTPUTS, PACK, BLOCK_P, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        y = acc.to(x.dtype.element_ty).to(tl.float32)
        mean, r, scale, bias = fold((weights, biases, means, variances), eps, m, c, is_channel, tl.float32)
        weight = tl.load(a + (image * M + m) * C + c, is_channel, 0.0)
        total += weight[None, :] * activate((y - mean[None, :]) * scale[None, :] + bias[None, :], negative_slope, ACTIVATION)
    is_pixel = tl.arange(0, BLOCK_P) < count
    tl.store(v + _at(image, images, row, column, c, OH, OW, C), total.to(v.dtype.element_ty), is_pixel[:, None] & is_channel[None, :])


def _precision(dtype: torch.dtype) -> str:
    """Of products: "half", "tf32" or "ieee"; for float32 as PyTorch's setting for convolutions has it."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _pack(inputs: int, outputs: int, groups: int, dtype: torch.dtype) -> int:
    """How many of the groups of so many channels a tile has.

    Packed they are 32 channels: with fewer a pixel's reads would be less than two sectors of 32 bytes, with more the zeros would
    cost more than the products. Without tensor cores they do anyway: 16. Without matrix products there are no zeros: 64."""
    channels = 64 if inputs == 1 else 16 if _precision(dtype) == "ieee" else 32
    return max(1, min(groups, channels // max(inputs, outputs)))


def _tile(inputs: int, outputs: int, groups: int, dtype: torch.dtype, pixels: int, channels: int) -> dict[str, int | str]:
    """For groups of `inputs` by `outputs` channels: a program makes BLOCK_P pixels by BLOCK_N channels of PACK groups, at most
    `pixels` by `channels`, from BLOCK_K input channels at a time, which are 128 bytes of a pixel.

    Products in IEEE have operands and results in registers: 64 by 64. Without matrix products a thread has 16 values, so that
    there are enough threads to hide the reads.

    On an H200 eight warps took longer than four whatever the tile, and copies of one step of the loop under way longer than those of
    three; four steps are for dense convolutions that have half of the 128 bytes."""
    precision, pack = _precision(dtype), _pack(inputs, outputs, groups, dtype)
    N, K = (max(16, triton.next_power_of_2(pack * width)) for width in (outputs, inputs))
    if inputs == 1:
        P, N, K = 32, min(N, 64), 1
    elif precision == "ieee":
        P, N, K = 64, min(N, 64), 16
    else:
        P, N, K = pixels, min(N, channels), min(K, 128 // dtype.itemsize)
    constants = {"PACK": pack, "BLOCK_P": P, "BLOCK_N": N, "BLOCK_K": K, "PRECISION": "ieee" if precision == "ieee" else "tf32"}
    return {**constants, "num_warps": 4, "num_stages": 4 if groups == 1 and K * dtype.itemsize < 128 else 3}


class _Device(NamedTuple):
    name: str | None
    multiprocessors: int
    has_wgmma: bool


@functools.cache
def _device(device: torch.device) -> _Device:
    """Where kernels are interpreted there is none to measure."""
    if device.type != "cuda":
        return _Device(None, 8, False)
    properties = torch.cuda.get_device_properties(device)
    return _Device(properties.name, properties.multi_processor_count, properties.major == 9)


class _Launch(NamedTuple):
    """`programs` for each tile of pixels, of which there are so many `tiles` in a segment; and what the kernels take for it: sizes, and the
    constants that they are compiled for."""

    programs: int
    tiles: int
    sizes: tuple[int, ...]
    constants: dict[str, object]


def _launch_of(
    x: Tensor, weights: Sequence[Tensor], stride: int, dilations: Sequence[int], groups: int, y: Tensor, segment: int, branches: int, most: int
) -> _Launch:
    """For x and what it gives, of the shape of y, whose tiles are of segments of so many pixels; so many `branches` have programs of their own.

    Tiles are of at most `most` pixels: of 64, what a wgmma takes, where a segment has no more, or there would not be one for every
    multiprocessor. Of channels they have at most 64, or as many as pixels where that does not spill: in half precision, by wgmma, of
    up to three branches."""
    (B, channels, H, W), (_, C, OH, OW), inputs = x.shape, y.shape, weights[0].shape[1]
    device = _device(x.device)
    for pixels in sorted({most, 64}, reverse=True):
        widest = pixels if device.has_wgmma and _precision(x.dtype) == "half" and branches <= 3 else 64
        tile = _tile(inputs, C // groups, groups, x.dtype, pixels, widest)
        tiles = triton.cdiv(segment, tile["BLOCK_P"])
        programs = triton.cdiv(groups, tile["PACK"]) * triton.cdiv(tile["PACK"] * (C // groups), tile["BLOCK_N"]) * branches
        if segment > 64 and B * OH * OW // segment * tiles * programs >= device.multiprocessors:
            break
    constants = {
        "KERNELS": tuple(weight.shape[2] for weight in weights),
        "DILATIONS": tuple(dilations),
        "STRIDE": stride,
        "SPLIT": channels // (groups * inputs),
        "GROUPS": groups,
        "INPUTS": inputs,
        "OUTPUTS": C // groups,
        **tile,
    }
    return _Launch(programs, tiles, (segment, H, W, OH, OW), constants)


def _launch_squeeze(
    x: Tensor, weights: Sequence[Tensor], stride: int, dilations: Sequence[int], groups: int, y: Tensor, norms: tuple, act: tuple[float, str], store: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The pooled sums; if they are to be stored, the branches, and mean, scale and bias of the batch-norms."""
    M, (B, C, OH, OW) = len(weights), y.shape
    launch = _launch_of(x, weights, stride, dilations, groups, y, OH * OW, M, 128)
    # Few, for attend reads them again and again; but enough programs.
    parts = min(launch.tiles, max(4, triton.cdiv(_device(x.device).multiprocessors, B * launch.programs)))
    pooled = x.new_empty((B, M * parts, C), dtype=torch.float32)
    ys = [empty_branch(x, weights, stride) for _ in weights] if store else None
    folded = x.new_empty((3, M, C), dtype=torch.float32) if store else None
    _branch_squeeze_kernel[(launch.programs * B * parts,)](
        x, weights, tuple(ys) if store else None, pooled, folded, *norms, parts, *launch.sizes, *act, **launch.constants
    )
    return pooled, ys, folded


def _by_taps(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(C, k, k, inputs) in memory: the input channels of a tap beside each other."""
    return tuple(weight.contiguous(memory_format=torch.channels_last) for weight in weights)


def _library(x: Tensor, weights: Sequence[Tensor], stride: int, dilations: Sequence[int], groups: int) -> list[Tensor]:
    """PyTorch's convolutions."""
    # It may have taken the layout of the weights.
    return [y.contiguous(memory_format=layout_of(x)) for y in convolutions(x, weights, stride, dilations, groups)]


def branch(x, weights, stride: int, dilations, groups: int, statistics: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    """y_m = w_m ∗ x_m, and their mean and variance, (M, C), empty without `statistics`.

    Floor: x and every y once, B·(C'·H·W + M·C·OH·OW) values; 2·M·B·OH·OW·C·inputs·k² flops."""
    convolution = x, weights, stride, dilations, groups
    roads = {"library": lambda: _branch_library(*convolution, statistics)}
    if is_channels_last(x):
        roads["own"] = lambda: _branch_own(*convolution, statistics)
    return _take("branch" if statistics else "branch without statistics", convolution, roads)


def _take(operator: str, convolution: tuple, roads: Mapping[str, Callable[[], T]]) -> T:
    """The result of the road that is chosen. It is the library's where nothing is known and nothing may be measured: on an H200 every
    unit took least that way."""
    return roads[choice.choose(_case(operator, *convolution), roads, "library", _device(convolution[0].device).name)]()


def _case(operator: str, x: Tensor, weights: Sequence[Tensor], stride: int, dilations: Sequence[int], groups: int) -> str:
    """The class of shapes that is measured once. Sizes of images and batches are rounded up to powers of two."""
    (B, channels, H, W), (C, inputs, *_) = x.shape, weights[0].shape
    layout = "channels_last" if is_channels_last(x) else "contiguous"
    precision = f"{x.dtype} {_precision(x.dtype)}".removeprefix("torch.")
    kernels = " ".join(f"{weight.shape[2]}/{dilation}" for weight, dilation in zip(weights, dilations))
    sizes = f"{triton.next_power_of_2(B)} images of {triton.next_power_of_2(H * W)}"
    return f"{operator}, {precision}, {layout}: {channels} to {C}, {inputs} a group, kernels {kernels}, stride {stride}, {sizes}"


def _branch_library(x, weights, stride: int, dilations, groups: int, statistics: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    ys = _library(x, weights, stride, dilations, groups)
    return ys, *(branch_statistics(ys) if statistics else no_statistics(x))


def _branch_own(x, weights, stride: int, dilations, groups: int, statistics: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Two launches: the convolutions, which leave the statistics of every tile, and what these amount to, if that is asked for."""
    M, weights = len(weights), _by_taps(weights)
    ys = [empty_branch(x, weights, stride) for _ in weights]
    C, pixels = ys[0].shape[1], ys[0].numel() // ys[0].shape[1]
    launch = _launch_of(x, weights, stride, dilations, groups, ys[0], pixels, M, 128)
    partials = x.new_empty((2, M, C, launch.tiles), dtype=torch.float32)
    _branch_kernel[(launch.programs * launch.tiles,)](x, weights, tuple(ys), partials, *launch.sizes, **launch.constants)
    if not statistics:
        return ys, *no_statistics(x)
    mean, var = (x.new_empty((M, C), dtype=torch.float32) for _ in range(2))
    _moments_kernel[(M * C,)](partials, mean, var, launch.tiles, pixels, BLOCK_P=launch.constants["BLOCK_P"], BLOCK=1024)
    return ys, mean, var


def branch_backward(
    g, x, weights, stride: int, dilations, groups: int, ys, mean, scale, bias, a, t, p, q, activation: str, negative_slope: float, needs
) -> tuple[Tensor, list[Tensor]]:
    """dx, and dw of every branch: the writing pass, and the library's convolutions, one call a branch.

    What `needs` says no to is empty."""
    dys = select_backward(g, ys, mean, scale, bias, a, t, p, q, activation, negative_slope)
    dx, dweights = convolutions_backward(dys, x, weights, stride, dilations, groups, needs)
    layout = layout_of(x)
    return dx.contiguous(memory_format=layout) if needs[0] else dx, [dw.contiguous(memory_format=layout) for dw in dweights]


def unit(
    x, weights, stride: int, dilations, groups: int, norm_weights, norm_biases, means, variances, eps: float,
    fc_reduce, attn_weight, attn_bias, attn_mean, attn_var, attn_eps: float, fc_select, activation: str, negative_slope: float,
) -> Tensor:  # fmt: skip
    """v, with given statistics.

    Floor: x and v once, B·(C'·H·W + C·OH·OW) values; the flops of `branch`. Roads: the library's convolutions, or our own with
    Σ u in their epilogue; or our own twice, for Σ u and for v, which writes no branch at all, for twice the flops."""
    convolution = x, weights, stride, dilations, groups
    norms = *(dense(vectors) for vectors in (norm_weights, norm_biases, means, variances)), eps
    attention = fc_reduce, attn_weight, attn_bias, attn_mean, attn_var, attn_eps, "relu", 0.0, fc_select, None
    rest = stride, dilations, groups, norms, attention, activation, negative_slope
    v = empty_branch(x, weights, stride)
    roads = {"library": lambda: _unit_library(x, v, weights, *rest)}
    if is_channels_last(x):
        roads["own"] = lambda: _unit_own(x, v, _by_taps(weights), *rest)
        roads["own twice"] = lambda: _unit_own_twice(x, v, _by_taps(weights), *rest)
    return _take("unit", convolution, roads)


def _unit_library(x, v, weights, stride: int, dilations, groups: int, norms, attention, activation: str, negative_slope: float) -> Tensor:
    ys = _library(x, weights, stride, dilations, groups)
    mean, _, scale, bias, pooled, _ = squeeze(ys, *norms, activation, negative_slope, 1)
    a = attend(pooled, v.shape[2] * v.shape[3], *attention)[0]
    return select(ys, mean, scale, bias, a, activation, negative_slope, v)


def _unit_own(x, v, weights, stride: int, dilations, groups: int, norms, attention, activation: str, negative_slope: float) -> Tensor:
    act = negative_slope, activation
    pooled, ys, folded = _launch_squeeze(x, weights, stride, dilations, groups, v, norms, act, store=True)
    a = attend(pooled, v.shape[2] * v.shape[3], *attention)[0]
    return select(ys, *folded, a, activation, negative_slope, v)


def _unit_own_twice(x, v, weights, stride: int, dilations, groups: int, norms, attention, activation: str, negative_slope: float) -> Tensor:
    act, (B, _, OH, OW) = (negative_slope, activation), v.shape
    pooled, _, _ = _launch_squeeze(x, weights, stride, dilations, groups, v, norms, act, store=False)
    a = attend(pooled, OH * OW, *attention)[0]
    # 64 pixels: the sum of the branches is in registers beside the branch.
    launch = _launch_of(x, weights, stride, dilations, groups, v, OH * OW, 1, 64)
    _branch_select_kernel[(launch.programs * B * launch.tiles,)](x, weights, v, a, *norms, *launch.sizes, *act, **launch.constants)
    return v
