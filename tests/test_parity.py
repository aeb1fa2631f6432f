"""The whole unit against timm's own, and sk_fused.reference against it too: the rule of parity.py for the output, the
input gradient, every parameter's gradient and every buffer, over several steps."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import BlurPool2d
from torch import Tensor, nn

import sk_fused
from benchmarks import harness

from .parity import DTYPES, LAYOUTS, assert_all_within, assert_parity, batches, freeze, pair, precision_of, step

# Constructor arguments of units that are fused wholly.
FUSED = {
    "default": dict(in_channels=16),
    "whole input": dict(in_channels=7, split_input=False),
    "one branch": dict(in_channels=6, kernel_size=[3]),
    "two of 5": dict(in_channels=8, kernel_size=5),
    "three branches": dict(in_channels=12, kernel_size=[3, 5, 7]),
    "four branches": dict(in_channels=8, kernel_size=[3, 5, 7, 9], out_channels=10),
    "kernels as they are": dict(in_channels=8, keep_3x3=False),
    "stride 2": dict(in_channels=16, stride=2),
    "stride 3": dict(in_channels=16, stride=3),
    "dilation 2": dict(in_channels=8, dilation=2),
    "dilation, kernels as they are": dict(in_channels=8, dilation=2, keep_3x3=False, kernel_size=[3, 5, 7], split_input=False),
    "groups": dict(in_channels=16, groups=4),
    "groups, whole input": dict(in_channels=32, groups=8, split_input=False, rd_divisor=32),
    "depthwise": dict(in_channels=12, groups=12, split_input=False),
    "more groups than channels": dict(in_channels=12, groups=64, split_input=False),
    "other output": dict(in_channels=8, out_channels=24, rd_ratio=1 / 2),
    "reduced channels": dict(in_channels=16, rd_channels=5),
    "rounded reduced channels": dict(in_channels=20, out_channels=20, rd_ratio=0.55, rd_divisor=4),
    "leaky ReLU": dict(in_channels=16, act_layer=nn.LeakyReLU),
    "leaky ReLU 0.3": dict(in_channels=16, act_layer=partial(nn.LeakyReLU, negative_slope=0.3)),
    "SiLU": dict(in_channels=16, act_layer=nn.SiLU),
    "identity": dict(in_channels=16, act_layer=nn.Identity),
    "no activation": dict(in_channels=16, act_layer=None),
    "eps, momentum": dict(in_channels=16, norm_layer=partial(nn.BatchNorm2d, eps=1e-2, momentum=0.4)),
    "momentum None": dict(in_channels=16, norm_layer=partial(nn.BatchNorm2d, momentum=None)),
    "not affine": dict(in_channels=16, norm_layer=partial(nn.BatchNorm2d, affine=False)),
    "no running statistics": dict(in_channels=16, norm_layer=partial(nn.BatchNorm2d, track_running_stats=False)),
    "no statistics, not affine": dict(in_channels=16, norm_layer=partial(nn.BatchNorm2d, affine=False, track_running_stats=False)),
}

# Of units whose branches are not fused, and a part of the warning that says so.
UNFUSED = {
    "GELU": (dict(in_channels=16, act_layer=nn.GELU), "activation GELU"),
    "GELU by name": (dict(in_channels=16, act_layer="gelu"), "activation GELU"),
    "GroupNorm": (dict(in_channels=16, norm_layer=partial(nn.GroupNorm, num_groups=4)), "norm layer GroupNormAct"),
    "norm by name": (dict(in_channels=16, norm_layer="layernorm2d"), "norm layer LayerNormAct2d"),
    "anti-aliasing": (dict(in_channels=16, stride=2, aa_layer=BlurPool2d), "anti-aliasing layer BlurPool2d"),
    "drop layer": (dict(in_channels=16, drop_layer=nn.Dropout), "drop layer Dropout"),
}

MODES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train": nn.Module.train,
    "eval": nn.Module.eval,
    "frozen": lambda unit: freeze(unit.train()),
    "branches frozen": lambda unit: freeze(unit.train(), "paths"),
    "attention frozen": lambda unit: freeze(unit.train(), "attn"),
}

# The gradient of the output in every form that autograd can hand over.
GRADIENTS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "sum": None,
    "expanded over pixels": lambda v: torch.randn(*v.shape[:2], 1, 1).to(v.dtype).expand(v.shape),
    "every other pixel": lambda v: torch.randn(*v.shape[:3], 2 * v.shape[3]).to(v.dtype)[..., ::2],
    "transposed": lambda v: torch.randn(v.shape).to(v.dtype).transpose(2, 3).contiguous().transpose(2, 3),
    "contiguous": lambda v: torch.randn(v.shape).to(v.dtype),
    "channels_last": lambda v: torch.randn(v.shape).to(dtype=v.dtype, memory_format=torch.channels_last),
}


def smooth_in_float16(dtype: torch.dtype) -> type[nn.Module]:
    """The rounding of y to float16 moves a few z across the kink of ReLU; on whose side more is chance, not precision."""
    return nn.SiLU if dtype == torch.float16 else nn.ReLU


def in_mode(mode: str, *units: nn.Module) -> list[nn.Module]:
    return [MODES[mode](unit) for unit in units]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", FUSED)
def test_fused_units(case: str, mode: str, layout: str):
    ours, theirs = in_mode(mode, *pair(layout=layout, **FUSED[case]))
    assert ours.why_not() is None
    assert_parity(ours, theirs, batches(3, (8, FUSED[case]["in_channels"], 9, 11), layout=layout))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", UNFUSED)
def test_units_whose_branches_are_not_fused(case: str, mode: str):
    arguments, reason = UNFUSED[case]
    ours, theirs = in_mode(mode, *pair(**arguments))
    assert reason in ours.why_not()
    with pytest.warns(RuntimeWarning, match=reason) as said:
        assert_parity(ours, theirs, batches(3, (8, 16, 9, 11)))
    assert len(said) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes_and_modes(mode: str, dtype: torch.dtype, layout: str, backend: str):
    ours, theirs = in_mode(mode, *pair(dtype, layout, in_channels=16, out_channels=19, act_layer=smooth_in_float16(dtype)))
    assert_parity(ours, theirs, batches(3, (8, 16, 7, 5), dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_output_of_relu_in_float16(mode: str, layout: str, backend: str):
    ours, theirs = in_mode(mode, *pair(torch.float16, layout, in_channels=16))
    (x,) = batches(1, (8, 16, 9, 11), torch.float16, layout)
    results = [{"output": unit(x.to(dtype)).detach()} for unit, dtype in ((ours, x.dtype), (theirs, x.dtype), (copy.deepcopy(theirs).double(), torch.float64))]
    assert_all_within(*results)


@pytest.mark.parametrize("case", FUSED)
def test_reference_backend(case: str):
    ours, theirs = pair(**FUSED[case])
    with sk_fused.use_backend("reference"):
        assert_parity(ours, theirs, batches(3, (8, FUSED[case]["in_channels"], 6, 5)))


@pytest.mark.parametrize("shape", [(8, 16, 1, 1), (7, 16, 1, 3), (8, 16, 31, 2), (6, 16, 40, 33), (1, 16, 8, 8), (1, 16, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(shape: tuple, layout: str, backend: str):
    modes = ("eval", "train") if shape[0] > 1 else ("eval", "frozen")
    for mode in modes:
        ours, theirs = in_mode(mode, *pair(layout=layout, in_channels=16))
        assert_parity(ours, theirs, batches(3, shape, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_every_layout(gradient: str, layout: str, dtype: torch.dtype):
    ours, theirs = pair(dtype, layout, in_channels=16)
    assert_parity(ours, theirs, batches(3, (8, 16, 7, 6), dtype, layout), GRADIENTS[gradient])


def test_input_that_is_not_dense():
    ours, theirs = pair(in_channels=8)
    wide, narrow = batches(1, (8, 16, 9, 20))[0], batches(1, (8, 8, 1, 5))[0]
    assert_parity(ours, theirs, [wide[:, ::2, :, 1::3], narrow.expand(8, 8, 4, 5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_mean_far_larger_than_deviation(mode: str, dtype: torch.dtype):
    ours, theirs = in_mode(mode, *pair(dtype, in_channels=8))
    assert_parity(ours, theirs, [300 + x for x in batches(2, (8, 8, 20, 20), dtype)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(mode: str, dtype: torch.dtype, backward_inside: bool, backend: str):
    """The weights in float32; the oracle in float64 knows no autocast."""
    ours, theirs = in_mode(mode, *pair(in_channels=16, act_layer=smooth_in_float16(dtype)))
    context = partial(torch.autocast, "cpu", dtype=dtype)
    (x,) = batches(1, (8, 16, 9, 8))
    with context():
        v = ours(x)
    assert v.dtype == dtype
    ours.load_state_dict(theirs.state_dict())
    if not backward_inside:
        assert_parity(ours, theirs, [x], autocast=context)
        return
    g = torch.randn_like(v)
    exact = copy.deepcopy(theirs).double()
    results = []
    for unit, unit_dtype, enabled in ((ours, torch.float32, True), (theirs, torch.float32, True), (exact, torch.float64, False)):
        with context(enabled=enabled):
            results.append(step(unit, x.to(unit_dtype), g.to(unit_dtype), context(enabled=enabled)))
    assert_all_within(*results)


@pytest.mark.parametrize("case", UNFUSED)
def test_autocast_of_units_whose_branches_are_not_fused(case: str):
    ours, theirs = pair(**UNFUSED[case][0])
    context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    (x,) = batches(1, (8, 16, 9, 8))
    with pytest.warns(RuntimeWarning), context():
        assert ours(x).dtype == torch.bfloat16
    ours.load_state_dict(theirs.state_dict())
    assert_parity(ours, theirs, [x], autocast=context)


def test_autocast_of_a_unit_that_is_not_fused_at_all():
    ours, _ = pair(in_channels=16)
    ours.attn.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="attn has hooks"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(torch.randn(2, 16, 8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_small_arrays_stay_in_float32_under_autocast(mode: str, backend: str):
    """The attention is computed in float32, and its gradients too: autocast changes none of its bits."""
    ours, _ = in_mode(mode, *pair(in_channels=16))
    s = torch.randn(4, 16)
    attn = ours.attn
    norm = sk_fused.functional.BatchNorm(attn.bn.weight, attn.bn.bias, attn.bn.running_mean, attn.bn.running_var, mode == "train")
    results = []
    for enabled in (False, True):
        leaf = s.clone().requires_grad_()
        ours.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            a = sk_fused.functional.attend(leaf, attn.fc_reduce.weight, norm, attn.fc_select.weight)
            a.square().sum().backward()
        results.append([a, leaf.grad, *(p.grad.clone() for p in attn.parameters())])
    for plain, autocast in zip(*results, strict=True):
        assert autocast.dtype == torch.float32 and torch.equal(plain, autocast)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.LeakyReLU, nn.SiLU, None])
def test_gradcheck(mode: str, act_layer: type[nn.Module] | None, backend: str):
    ours, _ = in_mode(mode, *pair(torch.float64, in_channels=4, out_channels=3, rd_channels=2, act_layer=act_layer))
    names, parameters = zip(*ours.named_parameters())

    def unit(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, values)), (x,))

    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, (x, *parameters), fast_mode=backend == "reference")


def test_gradients_of_gradients(backend: str):
    """From x, its gradient and the parameters, in training and in eval, through both of functional's functions."""
    for mode in ("train", "eval"):
        ours, _ = in_mode(mode, *pair(torch.float64, in_channels=4, out_channels=3, rd_channels=2, act_layer=nn.SiLU))
        names, parameters = zip(*ours.named_parameters())
        attn, norm = ours.attn, sk_fused.functional.BatchNorm.of(ours.attn.bn)

        def unit(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(ours, dict(zip(names, values)), (x,))

        def attention(s: Tensor, fc_reduce: Tensor, fc_select: Tensor) -> Tensor:
            return sk_fused.functional.attend(s, fc_reduce, norm, fc_select)

        x = torch.randn(3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(unit, (x, *parameters), fast_mode=True)
        s = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(attention, (s, attn.fc_reduce.weight, attn.fc_select.weight))


@pytest.mark.parametrize("frozen", ["fc_reduce", "paths", "bn"])
def test_gradients_where_some_parameters_need_none(frozen: str):
    units = pair(in_channels=16)
    for unit in units:
        for name, parameter in unit.named_parameters():
            parameter.requires_grad_(frozen not in name)
    assert_parity(*units, batches(3, (8, 16, 6, 5)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_a_few_images_at_a_time(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch):
    ours, theirs = in_mode("eval", *pair(dtype, layout, in_channels=16))
    (x,) = batches(1, (7, 16, 9, 8), dtype, layout)
    whole = ours(x).detach()
    assert whole.is_contiguous(memory_format=LAYOUTS[layout])
    monkeypatch.setattr(sk_fused.modules, "_CACHE_BYTES", 3 * 2 * 16 * 9 * 8 * dtype.itemsize)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            parts = ours(x)
            exact, timm = (copy.deepcopy(theirs).to(t)(x.to(t)) for t in (torch.float64, precision_of(dtype)))
        assert parts.is_contiguous(memory_format=LAYOUTS[layout])
        assert_all_within({"parts": parts, "whole": whole}, {"parts": timm, "whole": timm}, {"parts": exact, "whole": exact})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["default", "groups, whole input", "three branches", "stride 2", "leaky ReLU 0.3", "not affine", "no running statistics"])
def test_steps_put_together_in_c_and_in_python_agree_to_the_bit(case: str, mode: str, layout: str, monkeypatch: pytest.MonkeyPatch):
    """csrc/selective_kernel.cpp and functional._SelectiveKernel."""
    (unit,) = in_mode(mode, pair(layout=layout, **FUSED[case])[0])
    twin = copy.deepcopy(unit)
    (x,) = batches(1, (8, FUSED[case]["in_channels"], 9, 11), layout=layout)
    in_c = step(unit, x, None, torch.enable_grad())
    monkeypatch.setattr(sk_fused.functional, "native", None)
    in_python = step(twin, x, None, torch.enable_grad())
    assert in_c.keys() == in_python.keys()
    for name, value in in_c.items():
        assert torch.equal(value, in_python[name]) and value.stride() == in_python[name].stride(), name


@pytest.mark.usefixtures("two_threads")
def test_two_runs_agree_to_the_bit(backend: str):
    ours, _ = pair(in_channels=16)
    x, g = torch.randn(4, 16, 33, 31), torch.randn(4, 16, 33, 31)
    before = copy.deepcopy(ours.state_dict())
    results = []
    for _ in range(2):
        ours.load_state_dict(before)
        results.append(step(ours, x, g, torch.enable_grad()))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_drawn_arguments_and_shapes(data: st.DataObject):
    draw = data.draw
    M = draw(st.integers(1, 4), label="M")
    split = draw(st.booleans(), label="split_input")
    groups = draw(st.integers(1, 3), label="groups")
    arguments = dict(
        in_channels=M * groups * draw(st.integers(2, 4), label="width"),
        out_channels=groups * draw(st.integers(2, 9), label="out"),
        kernel_size=[draw(st.sampled_from([3, 5, 7]), label="kernel") for _ in range(M)],
        stride=draw(st.integers(1, 2), label="stride"),
        dilation=draw(st.integers(1, 2), label="dilation"),
        groups=groups,
        rd_channels=draw(st.integers(2, 9), label="D"),
        split_input=split,
        act_layer=draw(st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.SiLU, None]), label="act"),
        norm_layer=partial(nn.BatchNorm2d, affine=draw(st.booleans(), label="affine")),
    )
    layout = draw(st.sampled_from(list(LAYOUTS)), label="layout")
    mode = draw(st.sampled_from(list(MODES)), label="mode")
    shape = (draw(st.integers(6, 9), label="B"), arguments["in_channels"], draw(st.integers(5, 12), label="H"), draw(st.integers(5, 12), label="W"))
    torch.manual_seed(0)
    ours, theirs = in_mode(mode, *pair(layout=layout, **arguments))
    assert_parity(ours, theirs, batches(2, shape, layout=layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.LeakyReLU, nn.SiLU, None])
def test_plain_reference(mode: str, act_layer: type[nn.Module] | None, dtype: torch.dtype):
    """sk_fused.reference and sk_fused.functional, called with the pieces of timm's unit, against timm's unit."""
    _, theirs = in_mode(mode, *pair(dtype, in_channels=8, act_layer=act_layer))
    activation, slope = sk_fused.modules._activation(theirs.paths[0].bn.act)

    class Pieces(nn.Module):
        def __init__(self, function: Callable[..., Tensor]):
            super().__init__()
            self.function = function
            self.paths, self.attn = copy.deepcopy(theirs.paths), copy.deepcopy(theirs.attn)

        def forward(self, x: Tensor) -> Tensor:
            ys = [path.conv(x_m) for path, x_m in zip(self.paths, x.chunk(2, 1))]
            norms = [sk_fused.functional.BatchNorm.of(bn) for bn in (*(path.bn for path in self.paths), self.attn.bn)]
            v = self.function(ys, norms[:2], self.attn.fc_reduce.weight, norms[2], self.attn.fc_select.weight, activation, slope)
            sk_fused.functional.count_batches(self.attn.bn, *(path.bn for path in self.paths))
            return v

    for function in (sk_fused.reference.selective_kernel, sk_fused.functional.selective_kernel):
        assert_parity(Pieces(function), theirs, batches(3, (8, 8, 5, 7), dtype))


def test_bytes_kept_for_the_backward():
    """Two branch sizes of timm's six, and no third: u is never stored."""
    arguments = dict(in_channels=64, rd_ratio=1 / 8, rd_divisor=16)
    ours, theirs = pair(**arguments)
    x = torch.randn(2, 64, 56, 56)
    kept = [harness.bytes_kept(lambda: unit(x), unit, x) for unit in (ours, theirs)]
    branch = x.numel() * x.element_size()
    assert kept[0] <= 0.34 * kept[1]
    assert 2 * branch <= kept[0] < 2.05 * branch


def test_nothing_is_kept_in_inference():
    ours, _ = pair(in_channels=8)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert harness.bytes_kept(lambda: ours.eval()(x), ours, x) == 0
        assert not ours(x).requires_grad
