"""The branches' own convolutions: the operators branch, branch_backward and unit against PyTorch's convolutions, and the
units that use them against timm."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sk_fused import functional
from sk_fused.backends import native, reference
from sk_fused.functional import ACTIVATIONS

from . import parity
from .parity import LAYOUTS
from .test_operators import assert_passes_with, flat

# x channels, output channels, groups; B, H, W; stride; dilations. Direct: small groups, clusters that the channels do not
# fill, rows of whole and of broken tiles. Winograd: dense and grouped, whole and split, odd maps, maps below a tile.
CASES = {
    "4 a group": (40, 40, 10, (2, 9, 13), 1, (1, 2)),
    "4 a group, three dilations": (24, 24, 6, (2, 7, 11), 1, (1, 2, 3)),
    "4 a group, whole sixteens": (32, 32, 8, (2, 8, 16), 1, (1, 2)),
    "4 a group, 1 × 1 maps": (16, 16, 4, (2, 1, 1), 1, (3, 1)),
    "4 a group, stride 2": (24, 24, 6, (3, 8, 7), 2, (1, 2, 3)),
    "8 a group": (64, 64, 8, (2, 14, 16), 1, (2, 1)),
    "8 a group, narrow": (24, 24, 3, (2, 5, 2), 1, (1, 3)),
    "8 a group, flat": (16, 16, 2, (1, 2, 33), 1, (2, 3)),
    "8 a group, stride 2": (24, 24, 3, (1, 15, 14), 2, (3,)),
    "16 a group": (48, 48, 3, (2, 7, 7), 1, (1, 2, 3)),
    "16 a group, stride 2": (32, 32, 2, (2, 7, 10), 2, (1, 2)),
    "32 a group": (96, 96, 3, (2, 7, 7), 1, (1, 2)),
    "32 a group, stride 2": (64, 64, 2, (2, 5, 3), 2, (1, 2)),
    "dense, split": (64, 64, 1, (3, 14, 14), 1, (1, 2)),
    "dense, split in three": (48, 80, 1, (2, 9, 5), 1, (1, 2, 3)),
    "dense, whole": (48, 32, 1, (2, 10, 7), 1, (1, 2)),
    "dense, one branch": (64, 96, 1, (5, 6, 6), 1, (2,)),
    "wide groups, split": (192, 96, 2, (1, 5, 8), 1, (1, 3)),
    "dense, 1 × 1 maps": (32, 16, 1, (2, 1, 1), 1, (1, 2)),
    "dense, many tiles": (32, 32, 1, (2, 37, 35), 1, (1, 2)),
    "dense, small maps": (32, 144, 1, (5, 7, 7), 1, (1, 2)),
    "dense, many small maps": (32, 32, 1, (16, 7, 7), 1, (1, 2)),
    "dense, many inputs, split": (256, 144, 1, (3, 7, 9), 1, (2, 1)),
    "dense, long rows": (16, 16, 1, (1, 2, 131), 1, (2, 3)),
    "dense, more planes than fit": (128, 32, 1, (4, 7, 9), 1, (1, 2)),
    "dense, images that take turns in one plane": (128, 32, 1, (17, 7, 9), 1, (1, 2)),
    "dense, images that take turns, several spans": (128, 32, 1, (14, 7, 9), 1, (1, 2)),
    "dense, several spans": (64, 64, 1, (2, 16, 17), 1, (1, 2)),
    "dense, fewer images at last": (32, 32, 1, (5, 10, 11), 1, (3, 1)),
    "dense, narrow to wide": (16, 64, 1, (3, 9, 10), 1, (1, 2)),
    "dense, one column": (32, 32, 1, (2, 5, 1), 1, (3, 1)),
    "16 inputs, broad": (16, 16, 1, (1, 3, 113), 1, (1, 2)),
    "dense, split, broad": (128, 64, 1, (1, 4, 80), 1, (1, 2)),
    "16 a group, many groups": (256, 256, 16, (2, 5, 4), 1, (1, 2)),
}
LARGE_MAPS = {
    "8 a group, large map": (32, 32, 4, (4, 112, 112), 1, (1, 2)),
    "dense, large map": (32, 32, 1, (4, 112, 112), 1, (1, 2)),
    "dense, split, large map": (32, 32, 1, (2, 112, 113), 1, (1, 2)),
}


def operands(
    case: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous", activation: str = "relu", images: int | None = None
) -> dict[str, tuple]:
    """Arguments for the three operators; of so many images, if not of as many as the case has."""
    inputs, C, groups, (B, H, W), stride, dilations = (CASES | LARGE_MAPS)[case]
    B = images or B
    M, D = len(dilations), 8
    split = "split" in case
    x = torch.randn(B, inputs, H, W).to(dtype=dtype, memory_format=LAYOUTS[layout])
    share = inputs // groups // (M if split else 1)
    weights = [(torch.randn(C, share, 3, 3) / (9 * share) ** 0.5).to(dtype=dtype, memory_format=LAYOUTS[layout]) for _ in dilations]
    convolution = x, weights, stride, list(dilations), groups
    ys = [torch.randn(B, C, (H - 1) // stride + 1, (W - 1) // stride + 1).to(dtype=dtype, memory_format=LAYOUTS[layout]) for _ in dilations]
    mean, scale, bias, p, q = 0.1 * torch.randn(5, M, C)
    scale, a, t = 1 + scale, torch.randn(B, M, C).softmax(1), torch.randn(B, C)
    norms = [*scale], [*bias], [*mean], [*(0.5 + torch.rand(M, C))], 1e-5
    attn = torch.randn(D, C) / C**0.5, *torch.rand(4, D), 1e-5, torch.randn(M * C, D)
    return {
        "branch": convolution,
        "branch_backward": (torch.randn_like(ys[0]), *convolution, ys, mean, scale, bias, a, t, p, q, activation, 0.1, (True, True)),
        "unit": (*convolution, *norms, *attn, activation, 0.1),
    }


OPERATORS = ("branch", "branch_backward", "unit")


def cast(value, dtype: torch.dtype):
    """Every tensor in this dtype, for float64; for half precision the small arrays stay in float32."""
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, dtype) for item in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype) if dtype == torch.float64 or value.dim() == 4 else value


def results(backend, name: str, arguments: tuple) -> list[Tensor]:
    return flat(getattr(backend, name)(*arguments))


def assert_matches_pytorch(name: str, arguments: tuple, backend: ModuleType = native) -> None:
    exact = results(reference, name, cast(arguments, torch.float64))
    for i, tensors in enumerate(zip(results(backend, name, arguments), results(reference, name, arguments), exact, strict=True)):
        parity.assert_within(f"{name}[{i}]", *tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolutions_match_pytorch(case: str, dtype: torch.dtype, layout: str):
    for name in OPERATORS:
        assert_matches_pytorch(name, operands(case, dtype, layout)[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.bfloat16,), ids=str)
def test_units_of_many_images_match_pytorch(dtype: torch.dtype, layout: str):
    """More than 64 for each block that a device may hold: what a grid takes at a time, elsewhere."""
    assert_matches_pytorch("unit", operands("dense, whole", dtype, layout, images=70)["unit"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LARGE_MAPS)
def test_outputs_larger_than_the_caches_match_pytorch(case: str, layout: str):
    """They are written past these."""
    arguments = operands(case, layout=layout)
    # Without statistics: a mean near 0 of so many pixels is measured by the size of these, in test_operators.py.
    arguments["branch"] = *arguments["branch"], False
    for name in OPERATORS:
        assert_matches_pytorch(name, arguments[name])


@pytest.mark.parametrize("case", ["4 a group", "dense, split"])
def test_gradients_that_are_not_needed_are_not_computed(case: str):
    *arguments, _ = operands(case)["branch_backward"]
    dx, dweights = native.branch_backward(*arguments, (True, True))
    for needs in ((True, False), (False, True), (False, False)):
        some_dx, some_dweights = native.branch_backward(*arguments, needs)
        assert torch.equal(some_dx, dx if needs[0] else dx.new_empty(0))
        assert len(some_dweights) == (len(dweights) if needs[1] else 0)
        assert all(torch.equal(some, every) for some, every in zip(some_dweights, dweights))


@pytest.mark.parametrize("case", ["4 a group", "32 a group", "dense, split"])
def test_weight_gradients_of_large_batches_match_pytorch(case: str):
    """Sums over a hundred thousand pixels."""
    assert_matches_pytorch("branch_backward", operands(case, images=1000)["branch_backward"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["4 a group", "dense, split"])
def test_every_activation(case: str, activation: str):
    for name in ("branch_backward", "unit"):
        assert_matches_pytorch(name, operands(case, activation=activation)[name])


@pytest.mark.parametrize("case", ["8 a group", "dense, split"])
def test_weights_may_have_another_layout_than_x(case: str):
    for name in OPERATORS:
        x_last, plain = operands(case, layout="channels_last")[name], operands(case)[name]
        i = 1 + (name == "branch_backward")
        assert_matches_pytorch(name, (*x_last[:i], plain[i], *x_last[i + 1 :]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["4 a group", "16 a group, stride 2", "dense, split", "dense, whole"])
def test_outputs_have_the_layout_of_x(case: str, layout: str):
    arguments = operands(case, layout=layout)
    outputs = [*native.branch(*arguments["branch"])[0], native.branch_backward(*arguments["branch_backward"])[0], native.unit(*arguments["unit"])]
    assert all(output.is_contiguous(memory_format=LAYOUTS[layout]) for output in outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["4 a group", "16 a group, stride 2", "dense, split"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, case: str, layout: str):
    torch.library.opcheck(getattr(native, name), operands(case, layout=layout)[name])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    ["8 a group", "32 a group", "dense, many tiles", "dense, whole", "dense, narrow to wide", "dense, split in three", "dense, many small maps"],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_runs_and_threads_agree_to_the_bit(name: str, case: str, layout: str):
    """In eval the number of threads decides how many images are taken together, and by that how small maps' edges are computed."""
    arguments = operands(case, layout=layout)[name]
    first = results(native, name, arguments)
    for threads in (2, 1) if name == "unit" else (2, 1, 16):
        torch.set_num_threads(threads)
        assert_same(results(native, name, arguments), first)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", ["32 a group", "dense, whole"])
def test_half_precision_is_added_up_in_float32(case: str, dtype: torch.dtype):
    """The gradient of an x that all branches see: rounded once, whatever the layout."""
    arguments = operands(case, dtype)["branch_backward"]
    g, x, *convolution, ys, mean, scale, bias, a, t, p, q, activation, slope, needs = arguments
    g, x, *ys = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (g, x, *ys))
    dx, _ = native.branch_backward(g, x, *convolution, ys, mean, scale, bias, a, t, p, q, activation, slope, needs)
    assert torch.equal(dx, native.branch_backward(*arguments)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_keep_scratch_of_their_own(layout: str):
    """And what they keep is of any earlier call: larger, smaller, of another kind."""
    # These fill all memory anew, so that none is kept.
    torch.use_deterministic_algorithms(False)
    work = [
        (name, arguments, results(native, name, arguments))
        for case in ("dense, many tiles", "8 a group", "dense, 1 × 1 maps", "32 a group, stride 2", "dense, many inputs, split", "4 a group")
        for name, arguments in operands(case, layout=layout).items()
    ]

    def again(seed: int) -> bool:
        order = random.Random(seed).choices(work, k=100)
        return all(torch.equal(*pair) for name, arguments, expected in order for pair in zip(results(native, name, arguments), expected, strict=True))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(again, range(6)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dilations", [(1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("inputs, outputs, groups", [(16, 16, 2), (32, 32, 1), (16, 64, 1), (192, 16, 1)])
def test_integers_come_out_exactly(inputs: int, outputs: int, groups: int, dilations: tuple[int, int], layout: str):
    """Of Winograd's algorithm, whose halves and quarters float32 has: maps of every size up to nine, with what their edges leave out."""

    def integers(*shape: int) -> Tensor:
        tensor = torch.randint(-3, 4, shape).float()
        return tensor.to(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor

    C, zeros = groups * outputs, torch.zeros(2, groups * outputs)
    weights = [integers(C, inputs, 3, 3) for _ in dilations]
    for H in range(1, 10):
        for W in range(1, 10):
            B = (H + W) % 5 + 1
            x, g, a = integers(B, groups * inputs, H, W), integers(B, C, H, W), integers(B, 2, C)
            convolution = x, weights, 1, list(dilations), groups
            ys = reference.branch(*convolution)[0]
            assert_same(native.branch(*convolution, False)[0], ys)
            arguments = g, *convolution, ys, zeros, zeros + 1, zeros, a, integers(B, C), zeros, zeros, "identity", 0.0, [True, True]
            assert_same(flat(native.branch_backward(*arguments)), flat(reference.branch_backward(*arguments)))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True)), [tuple(their.shape) for their in theirs]


@pytest.mark.parametrize("case", ["8 a group", "dense, whole"])
def test_statistics_where_the_mean_is_far_larger(case: str):
    """Of y, whose own rounding is PyTorch's: the variance of what came out."""
    x, weights, *rest = operands(case)["branch"]
    ys, mean, var = native.branch(x + 100, [weight.abs() for weight in weights], *rest)
    exact = [(y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)) for y in ys]
    torch.testing.assert_close(mean.double(), torch.stack([m for m, _ in exact]), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), torch.stack([v for _, v in exact]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["8 a group", "dense, whole"])
def test_statistics_that_nobody_wants_are_empty(case: str):
    arguments = operands(case)["branch"]
    (ys, *_), (alone, *statistics) = native.branch(*arguments), native.branch(*arguments, False)
    assert_same(alone, ys)
    assert [statistic.shape for statistic in statistics] == [(0,), (0,)]


@pytest.mark.parametrize("case", LARGE_MAPS)
def test_unit_where_the_pooled_sums_are_long(case: str):
    arguments = [*operands(case)["unit"]]
    # Of activations that are nearly all above 0.
    arguments[6] = [bias + 4 for bias in arguments[6]]
    assert_matches_pytorch("unit", tuple(arguments))


@pytest.mark.parametrize("case", ["4 a group", "dense, split"])
def test_nan_reaches_the_outputs_that_it_should(case: str):
    """At least where PyTorch's is; Winograd's tiles may spread it by a pixel, never lose it."""
    x, *rest = operands(case)["branch"]
    x[1, 3, 4, 5] = float("nan")
    for ours, theirs in zip(native.branch(x, *rest)[0], reference.branch(x, *rest)[0], strict=True):
        assert (ours.isnan() | ~theirs.isnan()).all() and not ours[0].isnan().any()


BAD = {
    "x has another rank": (0, lambda x: x[0], ValueError, "x: .*B, C, H, W"),
    "x is empty": (0, lambda x: x[:0], ValueError, "x: "),
    "x is float64": (0, Tensor.double, TypeError, "x: .*Double"),
    "x is not dense": (0, lambda x: x[..., ::2], ValueError, "x: .*strides"),
    "x has other channels": (0, lambda x: x[:, :32].contiguous(), ValueError, "x: .*32"),
    "no weights": (1, lambda _: [], ValueError, "weights: .*0"),
    "weights of no outputs": (1, lambda ws: [w[:0] for w in ws], ValueError, "weights: .*0, 8, 3"),
    "weights differ": (1, lambda ws: [ws[0], ws[1][:32]], ValueError, "weights: "),
    "weights are 5 × 5": (1, lambda ws: [F.pad(w, (1, 1, 1, 1)) for w in ws], ValueError, "weights: .*5, 5"),
    "weights of another dtype": (1, lambda ws: [w.bfloat16() for w in ws], TypeError, "weights: .*BFloat16"),
    "weights in two layouts": (1, lambda ws: [ws[0], ws[1].to(memory_format=torch.channels_last)], ValueError, "weights: .*layout"),
    "stride": (2, lambda _: 3, ValueError, "stride: .*3"),
    "too few dilations": (3, lambda d: d[:1], ValueError, "dilations: .*1"),
    "dilation": (3, lambda _: [1, 4], ValueError, "dilations: .*4"),
    "groups": (4, lambda _: 0, ValueError, "groups: .*0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_operand_is_named(case: str):
    i, change, error, says = BAD[case]
    arguments = operands("8 a group")["branch"]
    with pytest.raises(error, match=says):
        native.branch(*arguments[:i], change(arguments[i]), *arguments[i + 1 :])


def test_bad_argument_of_the_whole_unit_is_named():
    x, weights, stride, dilations, groups, *_ = operands("8 a group")["unit"]
    norm = functional.without_norm(64, x)
    rest = stride, dilations, groups, [norm, norm], torch.randn(8, 64), functional.without_norm(8, x), torch.randn(128, 8)
    for error, says, arguments in (
        (ValueError, "x: .*64", (x[0], weights, *rest)),
        (ValueError, "weights: .*dilations", (x, weights[:1], *rest)),
        (ValueError, "weights: .*64, 8, 3", (x, [weights[0], weights[1][..., 0]], *rest)),
    ):
        with pytest.raises(error, match=says):
            functional.convolved(*arguments, "relu", 0.0)
    with pytest.raises(TypeError, match="s: .*int64"):
        functional.attend(torch.zeros(2, 64, dtype=torch.int64), *rest[-3:])


def test_bad_operand_of_the_backward_is_named():
    g, x, *rest = operands("8 a group")["branch_backward"]
    with pytest.raises(ValueError, match="ys: "):
        native.branch_backward(g[:, :, 1:].contiguous(), x, *rest[:4], [y[:, :, 1:].contiguous() for y in rest[4]], *rest[5:])
    *before, fc_select, activation, slope = operands("8 a group")["unit"]
    with pytest.raises(ValueError, match="fc_select: "):
        native.unit(*before, fc_select[:-1], activation, slope)


# What FusedSelectiveKernel is given, so that its convolutions are the package's own.
UNITS = {
    "split": dict(in_channels=32),
    "split, other width": dict(in_channels=64, out_channels=48, kernel_size=[3, 7]),
    "4 a group": dict(in_channels=32, groups=8, split_input=False, rd_channels=16),
    "8 a group, stride 2": dict(in_channels=24, groups=3, stride=2, split_input=False),
    "32 a group": dict(in_channels=64, groups=2, split_input=False),
    "one branch": dict(in_channels=16, kernel_size=[3]),
    "three branches": dict(in_channels=48, kernel_size=[3, 5, 7]),
}


def convolutions_used(unit: torch.nn.Module, x: Tensor) -> int:
    """How many convolutions the forward of a unit takes from PyTorch."""
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    with Count():
        copy.deepcopy(unit)(x)
    return sum("convolution" in name for name in calls)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", UNITS)
def test_unit_with_its_own_convolutions_matches_timm(case: str, layout: str):
    shape = (6, UNITS[case]["in_channels"], 9, 8)
    for training in (True, False):
        ours, theirs = (unit.train(training) for unit in parity.pair(layout=layout, **UNITS[case]))
        assert convolutions_used(ours, torch.randn(shape)) == 0
        parity.assert_parity(ours, theirs, parity.batches(3, shape, layout=layout))
    (x,) = parity.batches(1, shape, layout=layout)
    with torch.no_grad():
        v, timm_v = ours(x), theirs(x)
        parity.assert_within("eval without gradients", v, timm_v, theirs.double()(x.double()))
    assert v.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("case", ["4 a group", "8 a group, stride 2"])
def test_unit_under_autocast_matches_timm(case: str):
    arguments = UNITS[case]
    ours, theirs = parity.pair(**arguments)
    parity.assert_parity(ours, theirs, parity.batches(2, (6, arguments["in_channels"], 9, 8)), autocast=lambda: torch.autocast("cpu", torch.bfloat16))


def test_other_convolutions_are_pytorchs():
    for arguments in (dict(in_channels=8), dict(in_channels=32, keep_3x3=False), dict(in_channels=32, stride=2), dict(in_channels=32, groups=16)):
        ours, theirs = parity.pair(**arguments)
        x = torch.randn(4, arguments["in_channels"], 9, 9)
        assert convolutions_used(ours, x) == 2
        parity.assert_parity(ours, theirs, [x])


def test_training_between_two_evals_is_not_forgotten():
    """Nothing of the weights is kept from one call to the next."""
    for arguments in (UNITS["split"], UNITS["4 a group"]):
        ours, theirs = parity.pair(**arguments)
        x = torch.randn(4, 32, 9, 9)
        optimizers = [torch.optim.SGD(unit.parameters(), lr=0.1) for unit in (ours, theirs)]
        for unit, optimizer in zip((ours, theirs), optimizers):
            for _ in range(2):
                with torch.no_grad():
                    unit.eval()(x)
                optimizer.zero_grad()
                unit.train()(x).square().mean().backward()
                optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set_matches_pytorch(isa: str):
    assert_passes_with(isa, __file__, "match_pytorch")


def test_a_backend_that_does_not_take_them_says_why():
    x = torch.randn(2, 32, 8, 8)
    for shapes, stride, dilations, says in (
        ([(32, 32, 5, 5)], 1, [1], "3 × 3"),
        ([(32, 32, 3, 3)], 1, [4], "4"),
        ([(32, 32, 3, 3)] * 9, 1, [1] * 9, "9"),
        ([(48, 16, 3, 3)] * 2, 2, [1, 1], "stride 2"),
    ):
        assert says in native.why_not_convolve(x.shape, x.dtype, [torch.Size(shape) for shape in shapes], stride, dilations, 1, False, False)
    assert "float64" in native.why_not_convolve(x.shape, torch.float64, [torch.Size((32, 16, 3, 3))] * 2, 1, [1, 1], 1, False, False)

