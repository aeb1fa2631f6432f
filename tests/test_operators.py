"""Every native operator against its specification, sk_fused/backends/reference.py in float64."""

import os
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType

import numpy
import pytest
import torch
from torch import Tensor

from sk_fused.backends import native, reference
from sk_fused.functional import ACTIVATIONS

from . import parity
from .parity import DTYPES, LAYOUTS

OPERATORS = ("branch_statistics", "squeeze", "attend", "select", "select_backward_sums", "attend_backward", "fold_backward", "select_backward")
# Those that read branches.
PASSES = ("branch_statistics", "squeeze", "select", "select_backward_sums", "select_backward")

# Those of the attention's hidden layer.
HIDDEN = ("relu", "leaky_relu", "identity")

# M, B, C, H, W: odd sizes, 1 × 1 maps, channels below, at and beyond a vector of any instruction set and the tile of a GPU's block,
# more images than it takes at a time, pixels beyond a segment.
SHAPES = [(2, 3, 5, 7, 9), (1, 2, 16, 4, 4), (3, 1, 33, 1, 1), (4, 2, 19, 3, 5), (2, 1, 3, 67, 65), (2, 2, 40, 31, 29), (2, 2, 1, 3, 3), (2, 18, 3, 2, 2), (2, 2, 264, 2, 1)]


def operands(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", activation: str = "relu") -> dict[str, tuple]:
    """Arguments for every operator. The branches and g have `dtype`; the small arrays what is accumulated in."""
    M, B, C, H, W = shape
    D = max(1, C // 3)
    small = {"dtype": reference.accumulate_dtype(dtype)}
    ys = [torch.randn(B, C, H, W).to(dtype=dtype, memory_format=LAYOUTS[layout]) for _ in range(M)]
    g = torch.randn(B, C, H, W).to(dtype=dtype, memory_format=LAYOUTS[layout])
    mean, scale, bias, p, q = torch.randn(5, M, C, **small)
    s, t = torch.randn(2, B, C, **small)
    pooled, R1, R2, K1, K2 = torch.randn(5, B, M, C, **small)
    var = torch.rand(M, C, **small) + 0.1
    fc_reduce, fc_select, select_bias = torch.randn(D, C, **small), torch.randn(M * C, D, **small), torch.randn(M * C, **small)
    weight, attn_bias, attn_mean, attn_var = torch.randn(4, D, **small)
    attn_var = attn_var.square() + 0.1
    a, da = torch.randn(B, M, C, **small).softmax(1), torch.randn(B, M, C, **small)
    act = activation, 0.1
    hidden = activation if activation in HIDDEN else "relu", 0.1
    return {
        "branch_statistics": (ys,),
        "squeeze": (ys, [None, *scale[1:]], [*bias[:-1], None], [*mean], [*var], 1e-5, *act, 3),
        "attend": (pooled, H * W, fc_reduce, weight, attn_bias, attn_mean, attn_var, 1e-5, *hidden, fc_select, select_bias),
        "select": (ys, mean, scale, bias, a, *act),
        "select_backward_sums": (g, ys, mean, scale, bias, *act),
        "attend_backward": (da, a, s, s @ fc_reduce.t(), fc_reduce, weight, attn_bias, attn_mean, attn_var, 1e-5, True, *hidden, fc_select),
        "fold_backward": (a, s, H * W, R1, R2, K1, K2, var, scale, B * H * W),
        "select_backward": (g, ys, mean, scale, bias, a, t, p, q, *act),
    }


def cast(arguments: tuple, dtype: torch.dtype, small: torch.dtype) -> tuple:
    """The same arguments with branches (and g) in `dtype` and the small arrays in `small`."""

    def one(value):
        if isinstance(value, list):
            return [one(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype if value.dim() == 4 else small)

    return tuple(map(one, arguments))


def flat(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for each in result for tensor in flat(each)]


def results(backend: ModuleType, name: str, arguments: tuple) -> list[Tensor]:
    """What the operator returns, the pooled sum of squeeze over its second axis, whose length is the backend's choice."""
    result = getattr(backend, name)(*arguments)
    if name == "squeeze":
        *folded, pooled, K = result
        result = *folded, pooled.sum(1), K
    return flat(result)


def assert_matches_reference(name: str, arguments: tuple, dtype: torch.dtype, backend: ModuleType = native) -> None:
    ours = results(backend, name, arguments)
    exact = exact_statistics(*arguments) if name == "branch_statistics" else results(reference, name, cast(arguments, torch.float64, torch.float64))
    theirs_dtype = parity.precision_of(dtype)
    theirs = results(reference, name, cast(arguments, theirs_dtype, reference.accumulate_dtype(theirs_dtype)))
    largest = magnitudes(name, cast(arguments, torch.float64, torch.float64), exact)
    for i, tensors in enumerate(zip(ours, theirs, exact, largest, strict=True)):
        parity.assert_within(f"{name}[{i}]", *tensors)


def exact_statistics(ys: list[Tensor]) -> list[Tensor]:
    """Of torch.var_mean even float64 loses a few digits, so mean and variance are taken in numpy's long double."""
    moments = []
    for y in ys:
        values = y.double().contiguous().cpu().numpy().astype(numpy.longdouble)
        mean = values.mean((0, 2, 3), keepdims=True)
        var = numpy.square(values - mean).mean((0, 2, 3))
        moments.append([torch.from_numpy(moment.astype(numpy.float64)) for moment in (mean.ravel(), var)])
    return [torch.stack(moment).to(ys[0].device) for moment in zip(*moments)]


def magnitudes(name: str, arguments: tuple, exact: list[Tensor]) -> list[Tensor]:
    """What the ulp of a result is measured by: its values; where sums cancel, the sums of their terms' magnitudes."""
    if name == "branch_statistics":
        return [torch.stack([y.abs().mean((0, 2, 3)) for y in arguments[0]]), exact[1]]
    if name == "attend":
        a, s, reduced, mean, var = exact
        _, _, fc_reduce, weight, bias, _, _, eps, *act, fc_select, _ = arguments
        fc_reduce, weight, bias, fc_select = reference._parameters(s, fc_reduce, weight, bias, fc_select)
        terms = s.abs() @ fc_reduce.abs().t()
        # An error of the reduced descriptor goes into its variance by twice its distance from the mean.
        var_terms = var + 2 * (reduced - mean).abs().amax(0) * terms.amax(0)
        # Where the images are alike, the batch-norm blows up what is left of `reduced` and its mean.
        h = (reduced.abs() + mean.abs()) * torch.rsqrt(var + eps) * weight.abs() + bias.abs()
        logits = (h @ fc_select.abs().t()).view(a.shape)
        return [a + a * (1 - a) * logits, s, terms, terms.mean(0), var_terms]
    if name == "attend_backward":
        da, a, s, reduced, fc_reduce, weight, bias, mean, var, eps, _, *act, fc_select = arguments
        fc_reduce, weight, bias, fc_select = reference._parameters(s, fc_reduce, weight, bias, fc_select)
        dlogits = (a * (da.abs() + (a * da).abs().sum(1, keepdim=True))).flatten(1)
        x = (reduced - mean) * torch.rsqrt(var + eps)
        h = reference.activate(x * weight + bias, *act)
        dn = dlogits @ fc_select.abs()
        dbias, dweight = dn.sum(0), (dn * x.abs()).sum(0)
        dreduced = weight.abs() * torch.rsqrt(var + eps) * (dn + dbias / len(s) + x.abs() * dweight / len(s))
        return [dreduced @ fc_reduce.abs(), dreduced.t() @ s.abs(), dweight, dbias, dlogits.t() @ h.abs(), dlogits.sum(0)]
    if name == "fold_backward":
        a, ds, pixels, R1, R2, K1, K2, r, scale, count = arguments
        t = (ds / pixels)[:, None].abs()
        dbias, dscale = ((a * R).abs().add(t * K.abs()).sum(0) for R, K in ((R1, K1), (R2, K2)))
        share = (scale / count).abs() if count else torch.zeros_like(scale)
        return [exact[0], r * dscale, dbias, share * dbias, share * r * r * dscale]
    if name == "squeeze":
        ys, *_, activation, negative_slope, sums = arguments
        (mean, _, scale, bias), g, act = exact[:4], torch.ones_like(ys[0]), (activation, negative_slope)
    elif name == "select_backward_sums":
        g, ys, mean, scale, bias, *act = arguments
        sums = 3
    else:
        return exact
    pooled = []
    for y, *arrays in zip(ys, mean, scale, bias):
        branch_mean, branch_scale, branch_bias = (array[:, None, None] for array in arrays)
        d = y - branch_mean
        z = d * branch_scale + branch_bias
        k = reference.gate(z, g, *act)
        pooled.append(torch.stack([x.abs().sum((2, 3)) for x in (g * reference.activate(z, *act), k, k * d)[:sums]]))
    pooled = torch.stack(pooled, 2)
    return [*exact[:4], pooled[0].sum(1), *pooled[1:]] if name == "squeeze" else [*pooled]


def test_memory_that_nobody_wrote_is_nan():
    # The second to the fourth are allocated in C++, by at::empty and at::empty_strided.
    like = torch.zeros(2, 3, 4, 5)
    for poisoned in (torch.empty(7), like.new_empty(7), torch.empty_like(like, memory_format=torch.channels_last), torch.ops.aten.empty_strided(like.shape, (1, 2, 6, 24))):
        assert poisoned.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_operator_matches_reference(name: str, shape: tuple, dtype: torch.dtype, layout: str):
    activations = ACTIVATIONS if name != "branch_statistics" else ("relu",)
    for activation in activations:
        arguments = operands(shape, dtype, layout, activation)[name]
        assert_matches_reference(name, arguments, dtype)
        if name == "squeeze":
            assert_matches_reference(name, (*arguments[:-1], 1), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 64, 64, 66), (2, 2, 65, 65, 65)], ids=str)
@pytest.mark.parametrize("name", ["select", "select_backward"])
def test_outputs_larger_than_the_caches_match_reference(name: str, shape: tuple, dtype: torch.dtype, layout: str):
    """They are written past these, where they begin and go on at whole lines."""
    assert_matches_reference(name, operands(shape, dtype, layout)[name], dtype)


def shifted(value, by: int):
    """The same tensor, `by` values after the beginning of its memory; of a list, every one further than the one before."""
    if isinstance(value, list):
        return [shifted(item, by + i * by) for i, item in enumerate(value)]
    if not isinstance(value, Tensor):
        return value
    memory = torch.empty(value.numel() + by, dtype=value.dtype)
    return memory[by:].as_strided(value.shape, value.stride(), by).copy_(value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_operands_that_begin_anywhere_match_reference(name: str, dtype: torch.dtype, layout: str):
    arguments = operands((2, 2, 16, 5, 5), dtype, layout)[name]
    for together in (True, False):
        moved = [[shifted(y, 1) for y in value] if together and isinstance(value, list) else shifted(value, 1) for value in arguments]
        assert_matches_reference(name, tuple(moved), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_operators_match_reference(shape: tuple, dtype: torch.dtype):
    for activation in HIDDEN:
        arguments = operands(shape, dtype, activation=activation)
        given = arguments["attend"]
        assert_matches_reference("attend", given, dtype)
        assert_matches_reference("attend", (*given[:3], None, None, None, None, *given[7:-1], None), dtype)
        for training in (True, False):
            *before, _, activation, negative_slope, fc_select = arguments["attend_backward"]
            assert_matches_reference("attend_backward", (*before, training, activation, negative_slope, fc_select), dtype)
    for count in (arguments["fold_backward"][-1], 0):
        assert_matches_reference("fold_backward", (*arguments["fold_backward"][:-1], count), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["select", "select_backward"])
def test_output_has_the_layout_of_the_branches(name: str, layout: str):
    arguments = operands((2, 2, 8, 5, 6), torch.float32, layout)[name]
    for operator in (getattr(native, name), getattr(reference, name)):
        for output in flat(operator(*arguments)):
            assert output.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 2, 3, 67, 65), (1, 4, 40, 31, 29), (2, 4, 8, 2, 2)], ids=str)
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_variance_where_the_mean_is_far_larger(shape: tuple, layout: str, mean: float):
    """float32 against float64 of the same values: the variance is right to the rounding of float32's mean."""
    M, B, C, H, W = shape
    ys = [(mean + torch.randn(B, C, H, W)).to(memory_format=LAYOUTS[layout]) for _ in range(M)]
    ours, exact = native.branch_statistics(ys), exact_statistics(ys)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2 * eps, atol=0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=8 * eps, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_where_the_first_rows_are_far_from_the_rest(layout: str):
    """A masked border, as letter boxes have it: what a channel begins with says nothing about its mean."""
    y = 1e3 + torch.randn(2, 5, 67, 65)
    y[:, :, :4] = 0
    y[:, 1] += 1e4
    y[:, 2, 4:] -= 1e3
    ys = [y.to(memory_format=LAYOUTS[layout]), y.flip(2).to(memory_format=LAYOUTS[layout])]
    ours, exact = native.branch_statistics(ys), exact_statistics(ys)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2 * eps, atol=eps)
    # In channels_last a lane adds up all of a channel's squares.
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=16 * eps, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [5, 40, 200])
def test_variance_where_a_sample_is_far_from_the_rest(channels: int, layout: str):
    """Outliers at even distances, of some channels: a few pixels from all over the map may hit no other."""
    y = 1e3 + torch.randn(2, channels, 64, 64)
    y.flatten(2)[:, ::3, ::64] += 1e4
    ys = [y.to(memory_format=LAYOUTS[layout])]
    ours, exact = native.branch_statistics(ys), exact_statistics(ys)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2 * eps, atol=0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=16 * eps, atol=0)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_runs_and_threads_agree_to_the_bit(name: str, layout: str):
    arguments = operands((2, 4, 40, 31, 29), torch.float32, layout)[name]
    operator = getattr(native, name)
    first, second = flat(operator(*arguments)), flat(operator(*arguments))
    torch.set_num_threads(1)
    alone = flat(operator(*arguments))
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype, layout: str):
    torch.library.opcheck(getattr(native, name), operands((3, 2, 5, 4, 3), dtype, layout)[name])


def test_opcheck_of_every_form_of_the_optional_arguments():
    arguments = operands((2, 2, 5, 4, 3), torch.float32)
    torch.library.opcheck(native.squeeze, (*arguments["squeeze"][:-1], 1))
    given = arguments["attend"]
    torch.library.opcheck(native.attend, (*given[:3], None, None, None, None, *given[7:-1], None))


@pytest.mark.parametrize("name", ["squeeze", "select", "select_backward_sums", "select_backward"])
def test_nan_and_infinity_as_the_reference(name: str):
    for activation in ACTIVATIONS[:3]:
        arguments = operands((2, 2, 5, 3, 7), torch.float32, activation=activation)[name]
        ys = arguments[int(name.startswith("select_backward"))]
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
            ys[0].view(-1)[i * 21] = value
        for ours, exact in zip(flat(getattr(native, name)(*arguments)), flat(getattr(reference, name)(*arguments)), strict=True):
            torch.testing.assert_close(ours, exact, equal_nan=True)


def test_statistics_of_a_channel_with_nan_or_infinity_are_not_finite():
    for value in (float("nan"), float("inf")):
        (ys,) = operands((1, 2, 3, 5, 7), torch.float32)["branch_statistics"]
        ys[0][1, 1, 2, 3] = value
        mean, var = native.branch_statistics(ys)
        assert mean.isfinite().tolist() == var.isfinite().tolist() == [[True, False, True]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_softmax_and_silu_where_exp_saturates(dtype: torch.dtype):
    arguments = operands((2, 2, 5, 1, 1), dtype, activation="silu")
    *before, fc_select, select_bias = arguments["attend"]
    assert_matches_reference("attend", (*before, 1e4 * fc_select, select_bias), dtype)
    ys, mean, scale, bias, *rest = arguments["select"]
    assert_matches_reference("select", (ys, mean, 1e4 * scale, bias, *rest), dtype)


def replaced(arguments: tuple, i: int, value) -> tuple:
    return (*arguments[:i], value, *arguments[i + 1 :])


BAD = {
    "no branches": ("select", 0, lambda ys: [], ValueError, "ys"),
    "rank": ("select", 0, lambda ys: [y[0] for y in ys], ValueError, "ys"),
    "shapes differ": ("squeeze", 0, lambda ys: [ys[0], ys[1][:1]], ValueError, "ys"),
    "layouts differ": ("select", 0, lambda ys: [ys[0], ys[1].to(memory_format=torch.channels_last)], ValueError, "ys"),
    "not dense": ("select", 0, lambda ys: [y[..., ::2] for y in ys], ValueError, "ys"),
    "dtypes differ": ("select", 0, lambda ys: [ys[0], ys[1].double()], TypeError, "ys"),
    "no channels": ("squeeze", 0, lambda ys: [y[:, :0].contiguous() for y in ys], ValueError, "ys: .*C at least 1"),
    "integers": ("branch_statistics", 0, lambda ys: [y.int() for y in ys], TypeError, "ys"),
    "empty": ("branch_statistics", 0, lambda ys: [y[:0] for y in ys], ValueError, "ys"),
    "mean has another shape": ("select", 1, lambda mean: mean[:1], ValueError, "mean"),
    "mean has another dtype": ("select", 1, Tensor.double, TypeError, "mean"),
    "too few norm_weights": ("squeeze", 1, lambda ws: ws[:1], ValueError, "norm_weights"),
    "norm_biases": ("squeeze", 2, lambda bs: [bs[0][1:], None], ValueError, "norm_biases"),
    "too many means": ("squeeze", 3, lambda means: [*means, means[0]], ValueError, "variances"),
    "scale is transposed": ("select", 2, lambda scale: scale.t().contiguous().t(), ValueError, "scale"),
    "activation": ("select", 5, lambda _: "gelu", ValueError, "gelu"),
    "sums": ("squeeze", 8, lambda _: 2, ValueError, "sums.* 2"),
    "g has another shape": ("select_backward_sums", 0, lambda g: g[:1], ValueError, "g"),
    "g has another layout": ("select_backward", 0, lambda g: g.to(memory_format=torch.channels_last), ValueError, "g"),
    "a": ("select", 4, lambda a: a[:, :1], ValueError, "a"),
    "t": ("select_backward", 6, lambda t: t[:1], ValueError, "t"),
    "pooled is of half precision": ("attend", 0, Tensor.bfloat16, TypeError, "pooled"),
    "pooled has another rank": ("attend", 0, lambda pooled: pooled[0], ValueError, "pooled"),
    "pixels": ("attend", 1, lambda _: 0, ValueError, "pixels.* 0"),
    "fc_reduce": ("attend", 2, lambda fc: fc[:, :-1].contiguous(), ValueError, "fc_reduce"),
    "the hidden activation": ("attend", 8, lambda _: "silu", ValueError, "silu"),
    "fc_select": ("attend", 10, lambda fc: fc[:-1], ValueError, "fc_select"),
    "select_bias": ("attend", 11, lambda bias: bias[1:], ValueError, "select_bias"),
    "only one of mean and var": ("attend", 6, lambda _: None, ValueError, "mean, var"),
    "K1": ("fold_backward", 5, lambda K1: K1[:1], ValueError, "K1"),
    "var": ("attend_backward", 8, lambda var: var[:0], ValueError, "var"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_operand_is_named(case: str):
    name, i, change, error, says = BAD[case]
    arguments = operands((2, 2, 5, 4, 6), torch.float32)[name]
    with pytest.raises(error, match=says):
        getattr(native, name)(*replaced(arguments, i, change(arguments[i])))


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True)


def assert_passes_with(isa: str, file: str, which: str) -> None:
    """The tests of this file that `which` selects, in a process that is held to this instruction set."""
    used = run_python("-c", "import sk_fused.backends.native as n; print(n._C.instruction_set())", SK_FUSED_ISA=isa).stdout.strip()
    if used != isa:
        pytest.skip(f"this processor has no {isa}")
    run = run_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", f"{which} and not instruction_set", SK_FUSED_ISA=isa)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout and "failed" not in run.stdout


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set_matches_reference(isa: str):
    assert_passes_with(isa, __file__, "reference")


def test_unknown_instruction_set_is_refused():
    run = run_python("-c", "import sk_fused.backends.native as n; n._C.instruction_set()", SK_FUSED_ISA="mmx")
    assert run.returncode == 1 and "SK_FUSED_ISA: expected base, avx2 or avx512, got mmx" in run.stderr
