"""The Triton convolutions of the branches, by every road, against PyTorch's. tests/test_triton_branch.py runs this file, with
TRITON_INTERPRET=1."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import sk_fused
from sk_fused.backends import reference
from sk_fused.backends import triton as backend
from sk_fused.kernels import branch

from . import parity
from .parity import LAYOUTS
from .test_convolutions import cast

# x channels, output channels, groups; B, H, W; stride; dilations; kernels. Sizes that no block divides: pixels of several images in a
# tile, images of several tiles, groups that do not fill a pack, channels beyond a block in and out.
CASES = {
    "dense": (80, 136, 1, (2, 5, 7), 1, (1, 2), (3, 3)),
    "dense, split, stride 2": (44, 20, 1, (3, 7, 10), 2, (1, 2), (3, 3)),
    "dense, split in three": (60, 24, 1, (1, 5, 4), 1, (3, 1, 2), (3, 3, 3)),
    "4 a group": (40, 40, 10, (2, 7, 6), 1, (1, 2), (3, 3)),
    "8 a group, stride 2": (24, 24, 3, (1, 19, 17), 2, (1, 2, 3), (3, 3, 3)),
    "16 a group": (48, 48, 3, (1, 5, 7), 1, (2,), (3,)),
    "32 a group, stride 2": (64, 64, 2, (1, 5, 7), 2, (1, 3), (3, 3)),
    "6 to 10 a group, split": (48, 40, 4, (1, 4, 5), 1, (1, 2), (3, 3)),
    "depthwise": (37, 37, 37, (2, 5, 7), 1, (1, 2), (3, 3)),
    "depthwise, three each, split, stride 2": (40, 60, 20, (1, 6, 5), 2, (1, 2), (3, 3)),
    "large maps": (8, 136, 1, (1, 23, 24), 1, (1, 2), (3, 3)),
    "1 × 1 maps": (16, 16, 4, (3, 1, 1), 1, (1, 2), (3, 3)),
    "true 5 × 5 and 7 × 7": (8, 8, 2, (1, 8, 9), 1, (1, 1, 2), (3, 5, 7)),
}


def operands(case: str, dtype: torch.dtype = torch.float32, layout: str = "channels_last", activation: str = "relu") -> tuple[tuple, tuple]:
    """What all operators take, and what `unit` takes beside it."""
    inputs, C, groups, (B, H, W), stride, dilations, kernels = CASES[case]
    M, D, memory_format = len(dilations), 4, LAYOUTS[layout]
    x = torch.randn(B, inputs, H, W).to(dtype=dtype, memory_format=memory_format)
    share = inputs // groups // (M if "split" in case else 1)
    weights = [(torch.randn(C, share, k, k) / (k * k * share) ** 0.5).to(dtype=dtype, memory_format=memory_format) for k in kernels]
    norms = [torch.rand(C) + 0.5 for _ in dilations], [0.3 * torch.randn(C) for _ in dilations], [0.3 * torch.randn(C) for _ in dilations]
    attention = torch.randn(D, C) / C**0.5, torch.rand(D), None, torch.randn(D), torch.rand(D) + 0.5, 1e-5, torch.randn(M * C, D)
    variances = [torch.rand(C) + 0.5 for _ in dilations]
    return (x, weights, stride, list(dilations), groups), (*norms, variances, 1e-5, *attention, activation, 0.1)


def in_float64(arguments: tuple) -> tuple:
    return cast(arguments, torch.float64)


def exact_branches(x: Tensor, weights: list[Tensor], stride: int, dilations: list[int], groups: int) -> list[Tensor]:
    xs = [x] * len(weights) if x.shape[1] == groups * weights[0].shape[1] else x.chunk(len(weights), 1)
    return [F.conv2d(x_m, w, None, stride, d * (w.shape[2] // 2), d, groups) for x_m, w, d in zip(xs, weights, dilations, strict=True)]


def roads_of(call: Callable, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable]:
    """The roads that a call may take, by name."""
    roads = {}
    monkeypatch.setattr(branch, "_take", lambda operator, convolution, ways: roads.update(ways))
    call()
    return roads


def assert_convolutions_match(arguments: tuple) -> None:
    ys, mean, var = branch._branch_own(*arguments, True)
    exact, theirs = exact_branches(*in_float64(arguments)), exact_branches(*arguments)
    for m, tensors in enumerate(zip(ys, theirs, exact, strict=True)):
        parity.assert_within(f"y[{m}]", *tensors)
        assert ys[m].is_contiguous(memory_format=torch.channels_last)
    # Of what is stored.
    var_exact, mean_exact = (torch.stack(moments) for moments in zip(*(torch.var_mean(y.double(), (0, 2, 3), correction=0) for y in ys)))
    torch.testing.assert_close(mean.double(), mean_exact, rtol=1e-6, atol=1e-6 * max(y.abs().max().item() for y in ys))
    torch.testing.assert_close(var.double(), var_exact, rtol=1e-5, atol=1e-12)


HALF = [(case, dtype) for case in ("dense, split, stride 2", "4 a group", "depthwise") for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("case, dtype", [*((case, torch.float32) for case in CASES), *HALF], ids=str)
def test_convolutions_match_pytorch(case: str, dtype: torch.dtype):
    assert_convolutions_match(operands(case, dtype)[0])


@pytest.mark.parametrize(
    "case, dtype", [("dense", torch.bfloat16), ("dense, split, stride 2", torch.float32), ("8 a group, stride 2", torch.float32)], ids=str
)
def test_tiles_of_128_pixels_match_pytorch(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Which are chosen where there are enough of them for the device; in half precision they may have 128 channels, too."""
    monkeypatch.setattr(branch, "_device", lambda device: branch._Device(None, 1, True))
    assert_convolutions_match(operands(case, dtype)[0])



@pytest.mark.parametrize("case", ["dense, split in three", "4 a group"])
def test_products_in_ieee_match_pytorch(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(branch, "_precision", lambda dtype: "ieee")
    assert_convolutions_match(operands(case)[0])


def test_weights_may_be_contiguous():
    (x, weights, *rest), _ = operands("4 a group")
    assert_convolutions_match((x, [weight.contiguous() for weight in weights], *rest))


def test_statistics_where_the_mean_is_far_larger():
    (x, weights, *rest), _ = operands("16 a group")
    assert_convolutions_match((x + 100, [weight.abs() for weight in weights], *rest))


def test_statistics_of_many_tiles():
    """Against numpy: tiles beyond a block of them, the last one broken, means far from 0."""
    tiles, pixels = 1030, 1030 * 64 - 7
    y = 1000 + torch.randn(2, tiles * 64)
    y[:, pixels:] = float("nan")
    parts = y.view(2, tiles, 64).double()
    partials = torch.stack([parts.nanmean(2), (parts - parts.nanmean(2, keepdim=True)).square().nansum(2)]).float()
    mean, var = torch.empty(2, 2)
    branch._moments_kernel[(2,)](partials, mean, var, tiles, pixels, BLOCK_P=64, BLOCK=1024)
    var_exact, mean_exact = torch.var_mean(y[:, :pixels].double(), 1, correction=0)
    torch.testing.assert_close(mean.double(), mean_exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), var_exact, rtol=1e-5, atol=0)


@triton.jit
def _addresses_kernel(image, offsets, tile, segment, OH, OW, C: tl.constexpr, BLOCK_P: tl.constexpr):
    first, images, row, column, _ = branch._pixels(tile, segment, OH, OW, BLOCK_P)
    tl.store(image, first)
    at = branch._at(first, images, row, column, tl.arange(0, 2), OH, OW, C)
    tl.store(offsets + tl.arange(0, BLOCK_P)[:, None] * 2 + tl.arange(0, 2)[None, :], at)


@pytest.mark.parametrize("per_image", [False, True])
def test_offsets_beyond_32_bits(per_image: bool):
    """The last tile of 300 000 images of 14 × 14 pixels, which are 30 · 10⁹ values."""
    B, OH, OW, C = 300_000, 14, 14, 512
    segment = OH * OW if per_image else B * OH * OW
    tile = B * OH * OW // segment * -(-segment // 64) - 1
    image, offsets = torch.empty(1, dtype=torch.int64), torch.empty(64, 2, dtype=torch.int64)
    _addresses_kernel[(1,)](image, offsets, tile, segment, OH, OW, C=C, BLOCK_P=64)
    first = (tile // -(-segment // 64)) * segment + tile % -(-segment // 64) * 64
    assert image.item() == first // (OH * OW)
    assert torch.equal(offsets, (first + torch.arange(64)[:, None]) * C + torch.arange(2))


@pytest.mark.parametrize(
    "case, dtype, activation",
    [
        ("dense, split, stride 2", torch.float32, "silu"),
        ("depthwise, three each, split, stride 2", torch.float16, "leaky_relu"),
        ("4 a group", torch.float32, "relu"),
        ("4 a group", torch.bfloat16, "relu"),
        ("8 a group, stride 2", torch.float32, "identity"),
        ("large maps", torch.float32, "relu"),
        ("large maps", torch.bfloat16, "relu"),
        ("1 × 1 maps", torch.float32, "relu"),
    ],
    ids=str,
)
def test_every_road_of_the_unit_matches_reference(case: str, dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch):
    convolution, rest = operands(case, dtype, activation=activation)
    exact, theirs = reference.unit(*in_float64(convolution), *in_float64(rest)), reference.unit(*convolution, *rest)
    if case == "large maps":
        # Tiles of 128 pixels and channels, of which a program has several.
        monkeypatch.setattr(branch, "_device", lambda device: branch._Device(None, 1, True))
    roads = roads_of(lambda: branch.unit(*convolution, *rest), monkeypatch)
    assert roads.keys() == {"library", "own", "own twice"}
    for name in roads:
        # Each into new memory, which is NaN.
        v = roads_of(lambda: branch.unit(*convolution, *rest), monkeypatch)[name]()
        parity.assert_within(name, v, theirs, exact)
        assert v.is_contiguous(memory_format=torch.channels_last)


def test_norms_without_weights_and_in_other_dtypes(monkeypatch: pytest.MonkeyPatch):
    convolution, (weights, biases, means, variances, *rest) = operands("4 a group")
    rest = [weights[0].double(), None], [None, biases[1].half()], [means[0].bfloat16(), means[1]], variances, *rest
    exact, theirs = reference.unit(*in_float64(convolution), *in_float64(rest)), reference.unit(*convolution, *rest)
    roads = roads_of(lambda: branch.unit(*convolution, *rest), monkeypatch)
    for name in ("own", "own twice"):
        parity.assert_within(name, roads[name](), theirs, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]], ids=str)
def test_backward_matches_reference(needs: list[bool], layout: str):
    for case in ("dense, split, stride 2", "4 a group"):
        (x, *convolution), _ = operands(case, layout=layout)
        ys = exact_branches(x, *convolution)
        M, C, B = len(ys), ys[0].shape[1], x.shape[0]
        mean, scale, bias, p, q = 0.1 * torch.randn(5, M, C)
        arguments = torch.randn_like(ys[0]), x, *convolution, ys, mean, 1 + scale, bias, torch.randn(B, M, C).softmax(1), torch.randn(B, C), p, q
        arguments = *arguments, "relu", 0.0, needs
        (dx, dweights), (dx_theirs, theirs), (dx_exact, exact) = (
            backend.branch_backward(*values) for backend, values in ((branch, arguments), (reference, arguments), (reference, in_float64(arguments)))
        )
        assert dx.shape == dx_exact.shape and len(dweights) == len(exact)
        for name, *tensors in zip(("dx", "dw0", "dw1"), (dx, *dweights), (dx_theirs, *theirs), (dx_exact, *exact)):
            parity.assert_within(name, *tensors)
            assert name == "dx" and not needs[0] or tensors[0].is_contiguous(memory_format=LAYOUTS[layout])


def test_runs_agree_to_the_bit(monkeypatch: pytest.MonkeyPatch):
    convolution, rest = operands("32 a group, stride 2")
    (first, *moments), (second, *again) = branch._branch_own(*convolution, True), branch._branch_own(*convolution, True)
    assert all(torch.equal(*pair) for pair in zip((*first, *moments), (*second, *again), strict=True))
    for name, road in roads_of(lambda: branch.unit(*convolution, *rest), monkeypatch).items():
        assert torch.equal(road().clone(), road()), name


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Where there are convolutions of our own they are taken, in eval twice. Gives the roads taken so far."""
    taken = set()

    def choose(case: str, roads, *_) -> str:
        *_, road = roads
        taken.add(road)
        return road

    monkeypatch.setattr(branch.choice, "choose", choose)
    return taken


@pytest.mark.usefixtures("own")
def test_nan_reaches_the_outputs_that_it_should_and_no_other():
    (x, *convolution), rest = operands("4 a group")
    x[1, 3, 4, 5] = float("nan")
    for ours, theirs in zip(branch._branch_own(x, *convolution, False)[0], exact_branches(x, *convolution), strict=True):
        # A group's neighbours in the tile multiply what is not theirs by 0.
        assert (ours.isnan() | ~theirs.isnan()).all() and not ours[0].isnan().any()
    v = branch.unit(x, *convolution, *rest)
    assert v[1].isnan().any() and not v[0].isnan().any()


@pytest.fixture
def forced():
    with sk_fused.use_backend("triton"):
        yield


# What FusedSelectiveKernel is given, and the channels of x.
UNITS = {
    "split": dict(in_channels=24),
    "4 a group, stride 2": dict(in_channels=16, groups=4, stride=2, split_input=False),
    "depthwise, three branches": dict(in_channels=8, groups=8, kernel_size=[3, 5, 7], split_input=False),
    "5 × 5": dict(in_channels=8, groups=2, keep_3x3=False, split_input=False),
}


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", UNITS)
def test_unit_matches_timm(case: str, layout: str, own: set[str]):
    """In training, and in eval with and without gradients."""
    shape = (3, UNITS[case]["in_channels"], 5, 4)
    for training in (True, False):
        ours, theirs = (unit.train(training) for unit in parity.pair(layout=layout, **UNITS[case]))
        parity.assert_parity(ours, theirs, parity.batches(2 if training else 1, shape, layout=layout))
    (x,) = parity.batches(1, shape, layout=layout)
    with torch.no_grad():
        v, timm_v = ours(x), theirs(x)
        parity.assert_within("eval without gradients", v, timm_v, theirs.double()(x.double()))
    assert v.is_contiguous(memory_format=LAYOUTS[layout])
    assert own == ({"own", "own twice"} if layout == "channels_last" else {"library"})


@pytest.mark.usefixtures("forced", "own")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_unit_in_half_precision_matches_timm(dtype: torch.dtype):
    arguments = UNITS["4 a group, stride 2"]
    parity.assert_parity(*parity.pair(dtype, "channels_last", **arguments), parity.batches(1, (3, 16, 7, 6), dtype, "channels_last"))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str):
    (x, *convolution), rest = operands("32 a group, stride 2", layout=layout)
    ys = exact_branches(x, *convolution)
    M, C, B = len(ys), ys[0].shape[1], x.shape[0]
    mean, scale, bias, p, q = torch.randn(5, M, C)
    small = mean, scale, bias, torch.randn(B, M, C).softmax(1), torch.randn(B, C), p, q
    for statistics in (True, False):
        torch.library.opcheck(backend.branch, (x, *convolution, statistics))
    torch.library.opcheck(backend.unit, (x, *convolution, *rest))
    for needs in ([True, True], [False, False]):
        torch.library.opcheck(backend.branch_backward, (torch.randn_like(ys[0]), x, *convolution, ys, *small, "relu", 0.0, needs))
