"""The modules as classes: signature, weights, checkpoints, fallbacks and what they say, bad input, failed calls."""

import copy
import inspect
import io
import pickle
import sys
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import SelectiveKernel
from timm.layers.selective_kernel import SelectiveKernelAttn
from torch import Tensor, nn

import sk_fused
from sk_fused import FusedSelectiveKernel, FusedSelectiveKernelAttn
from sk_fused.functional import BatchNorm, attend, count_batches, selective_kernel

from .parity import assert_all_within, assert_parity, pair

CLASSES = [(FusedSelectiveKernel, SelectiveKernel), (FusedSelectiveKernelAttn, SelectiveKernelAttn)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("ours, theirs", CLASSES)
def test_signature(ours: type[nn.Module], theirs: type[nn.Module]):
    def arguments(module: type[nn.Module]) -> list[tuple]:
        return [(p.name, p.default, p.kind) for p in inspect.signature(module).parameters.values()]

    assert arguments(ours) == arguments(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_seed_same_weights_and_checkpoints_both_ways(dtype: torch.dtype):
    units = []
    for unit_class in CLASSES[0]:
        torch.manual_seed(3)
        units.append(unit_class(16, 24, kernel_size=[3, 5, 7, 9], groups=4, dtype=dtype))
    ours, theirs = units
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for to, other in ((ours, theirs), (theirs, ours)):
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        to.load_state_dict(other.state_dict(), strict=True)
        assert_same_state(to.state_dict(), other.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda unit: pickle.loads(pickle.dumps(unit)), saved_and_loaded], ids=["deepcopy", "pickle", "torch.save"])
def test_copies(copied: Callable[[nn.Module], nn.Module]):
    unit, _ = pair(in_channels=8)
    twin = copied(unit)
    assert type(twin) is FusedSelectiveKernel and twin.attn.fc_reduce.weight is not unit.attn.fc_reduce.weight
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(unit(x), twin(x))
    assert_same_state(unit.state_dict(), twin.state_dict())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_alone(mode: str, dtype: torch.dtype, backend: str):
    units = []
    for unit_class, unit_dtype in ((FusedSelectiveKernelAttn, dtype), (SelectiveKernelAttn, dtype), (SelectiveKernelAttn, torch.float64)):
        torch.manual_seed(3)
        units.append(getattr(unit_class(6, num_paths=3, attn_channels=4, dtype=dtype).to(unit_dtype), mode)())
    x = torch.randn(8, 3, 6, 5, 4) + torch.randn(8, 3, 6, 1, 1)
    results = []
    for unit in units:
        leaf = x.to(dtype).to(unit.fc_reduce.weight.dtype).clone().requires_grad_()
        a = unit(leaf)
        assert a.shape == (8, 3, 6, 1, 1) and a.dtype == leaf.dtype
        (a * torch.arange(3.0, device=a.device).to(a.dtype).view(1, 3, 1, 1, 1)).sum().backward()
        results.append({"a": a.detach(), "x.grad": leaf.grad, **{n: p.grad for n, p in unit.named_parameters()}, **dict(unit.named_buffers())})
    assert_all_within(*results)


def test_output_has_the_layout_of_the_input():
    unit, _ = pair(in_channels=8)
    x = torch.randn(2, 8, 6, 5)
    assert unit(x).is_contiguous()
    unit = unit.to(memory_format=torch.channels_last)
    assert unit(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("build", [lambda: FusedSelectiveKernel(8, kernel_size=4), lambda: FusedSelectiveKernel(8, kernel_size=[3, 1]), lambda: FusedSelectiveKernel(9)])
def test_impossible_arguments(build: Callable[[], nn.Module]):
    with pytest.raises(ValueError, match="kernel_size: .* got|in_channels: .* got 9"):
        build()


@pytest.mark.parametrize("arguments", [dict(stride=(2, 2)), dict(stride=(2, 1)), dict(dilation=(2, 1), keep_3x3=False)], ids=str)
@pytest.mark.parametrize("made", ["with timm", "before timm"])
def test_one_number_for_each_direction(made: str, arguments: dict, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as before_timm:
        if made == "before timm":
            before_timm.delitem(sys.modules, "timm.layers")
        units = pair(in_channels=8, **arguments)
    assert units[0].paths[0].in_channels == 4 and units[0].paths[0].out_channels == 8
    assert_parity(*units, [torch.randn(3, 8, 9, 8)])


def test_weights_that_a_hook_brings():
    """As those who keep them elsewhere do; x is held against the weights only where they are known to be there."""
    units = pair(in_channels=8)
    for unit in units:
        for path in unit.paths:
            weight = path.conv.weight
            path.conv.weight = nn.Parameter(weight.detach().to("meta"))
            path.conv.register_forward_pre_hook(lambda conv, _, weight=weight: setattr(conv, "weight", weight))
    x = torch.randn(3, 8, 6, 5)
    torch.testing.assert_close(units[0](x), units[1](x), rtol=1e-5, atol=1e-5)


HOOKS = {
    "forward": nn.Module.register_forward_hook,
    "forward, before": nn.Module.register_forward_pre_hook,
    "backward": nn.Module.register_full_backward_hook,
    "backward, before": nn.Module.register_full_backward_pre_hook,
    "forward replaced": lambda module, note: setattr(module, "forward", lambda *args: (note(), type(module).forward(module, *args))[1]),
}
PLACES = {"paths.0": "paths.0 has hooks", "paths.1.bn": "paths.1 has hooks", "attn": "attn has hooks", "attn.fc_reduce": "layers of attn have hooks", "attn.fc_select": "layers of attn have hooks"}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", PLACES)
def test_hooks_are_called_and_the_reason_said_once(place: str, kind: str):
    ours, theirs = pair(in_channels=8)
    calls: list[str] = []
    HOOKS[kind](ours.get_submodule(place), lambda *_: calls.append(place))
    assert PLACES[place] in ours.why_not()
    x = torch.randn(4, 8, 6, 5)
    with pytest.warns(RuntimeWarning, match=PLACES[place]) as said:
        for expected in (1, 2):
            v = ours(x.clone().requires_grad_())
            v.sum().backward()
            assert len(calls) == expected
    assert len(said) == 1
    theirs(x)
    torch.testing.assert_close(v, theirs(x))


def test_a_hook_on_a_convolution_keeps_the_unit_fused():
    unit, _ = pair(in_channels=8)
    calls = []
    unit.paths[0].conv.register_forward_hook(lambda *_: calls.append(1))
    assert unit.why_not() is None
    with torch.no_grad():
        unit.eval()(torch.randn(4, 8, 6, 5))
    assert calls == [1]


def test_two_units_with_one_reason_say_it_once():
    units = [FusedSelectiveKernel(8, act_layer=nn.GELU) for _ in range(2)]
    with pytest.warns(RuntimeWarning) as said:
        for unit in units:
            unit(torch.randn(2, 8, 4, 4))
    assert len(said) == 1


def replace(module: nn.Module, name: str, value: nn.Module) -> nn.Module:
    module.set_submodule(name, value)
    return module


REPLACED = {
    "attn": (nn.Sequential(nn.Flatten(1, 2), nn.AdaptiveAvgPool2d(1), nn.Unflatten(1, (2, 8))), "attn is a Sequential"),
    "attn.bn": (nn.Identity(), "attn.bn is a Identity"),
    "attn.act": (nn.Tanh(), "attn.act is a Tanh"),
    "attn.fc_reduce": (nn.Conv2d(8, 8, 1), "attn.fc_reduce is not a 1 × 1 convolution"),
    "paths.0": (nn.Conv2d(4, 8, 3, padding=1), "paths.0 is a Conv2d"),
    "paths.1.bn.act": (nn.LeakyReLU(), "differ in their activation"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_layers_are_used_and_named(name: str):
    value, reason = REPLACED[name]
    ours, theirs = (replace(unit, name, value) for unit in pair(in_channels=8))
    assert reason in ours.why_not()
    x = torch.randn(4, 8, 6, 5)
    with pytest.warns(RuntimeWarning, match=reason):
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_replaced_convolution_is_used(mode: str):
    """Of any kind: what it gives is fused."""
    separable = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 8, 1))
    ours, theirs = (replace(unit, "paths.0.conv", separable).train(mode == "train") for unit in pair(in_channels=8))
    assert ours.why_not() is None
    x = torch.randn(4, 8, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_branches_of_different_modes():
    ours, theirs = pair(in_channels=8)
    for unit in (ours, theirs):
        unit.paths[0].bn.eval()
    with pytest.warns(RuntimeWarning, match="batch-norms differ: training=False.*training=True"):
        torch.testing.assert_close(ours(x := torch.randn(4, 8, 6, 5)), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def unfused_branches() -> nn.Module:
    return FusedSelectiveKernel(8, act_layer=nn.GELU)


def unfused_attention() -> nn.Module:
    unit = FusedSelectiveKernel(8)
    unit.attn.register_forward_hook(lambda *_: None)
    return unit


ROADS = {"fused": lambda: FusedSelectiveKernel(8), "branches unfused": unfused_branches, "unfused": unfused_attention}

BAD_INPUT = {
    "rank": (lambda x: x[0], ValueError, r"x: expected shape \(B, 8, H, W\), got \(8, 6, 5\)"),
    "channels": (lambda x: x[:, :6], ValueError, r"x: expected shape \(B, 8, H, W\), got \(4, 6, 6, 5\)"),
    "integers": (lambda x: x.int(), TypeError, "x: expected a floating-point tensor, got torch.int32"),
    "dtype": (lambda x: x.double(), TypeError, "x: expected torch.float32.*got torch.float64"),
    "half precision": (lambda x: x.bfloat16(), TypeError, "x: expected torch.float32.*got torch.bfloat16"),
    "device": (lambda x: x.to("meta"), ValueError, "x: expected a tensor on cpu.*got one on meta"),
    "one value per channel": (lambda x: x[:1, :, :1, :1], ValueError, "Expected more than 1 value per channel when training"),
    "one image": (lambda x: x[:1], ValueError, "Expected more than 1 value per channel when training"),
}


@pytest.mark.filterwarnings("ignore:sk_fused")
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_and_changes_nothing(case: str, road: str, backend: str):
    change, error, says = BAD_INPUT[case]
    unit = ROADS[road]()
    x = torch.randn(4, 8, 6, 5)
    unit(x)
    before = state(unit)
    with pytest.raises(error, match=says):
        unit(change(x))
    assert_same_state(before, unit.state_dict())


def test_the_error_of_one_image_is_timms():
    ours, theirs = pair(in_channels=8)
    for x in (torch.randn(1, 8, 4, 4), torch.randn(1, 8, 1, 1)):
        messages = []
        for unit in (ours, theirs):
            with pytest.raises(ValueError) as raised:
                unit(x)
            messages.append(str(raised.value).partition("torch.Size")[0])
        assert messages[0] == messages[1]


def test_a_failing_convolution_changes_nothing():
    unit, _ = pair(in_channels=8)
    unit.paths[1].conv.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stopped")))
    before = state(unit)
    with pytest.raises(KeyError, match="stopped"):
        unit(torch.randn(4, 8, 6, 5))
    assert_same_state(before, unit.state_dict())


@pytest.mark.filterwarnings("ignore:sk_fused")
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("size", [(6, 5), (1, 1)])
def test_empty_batch(road: str, size: tuple):
    unit = ROADS[road]().eval()
    before = state(unit)
    x = torch.empty(0, 8, *size, requires_grad=True)
    v = unit(x)
    assert v.shape == (0, 8, *size)
    v.sum().backward()
    assert x.grad.shape == x.shape
    assert_same_state(before, unit.state_dict())
    assert unit.attn(torch.empty(0, 2, 8, *size)).shape == (0, 2, 8, 1, 1)


@pytest.mark.filterwarnings("ignore:sk_fused")
@pytest.mark.parametrize("road", ROADS)
def test_nan_propagates(road: str, backend: str):
    """To its image and to no other in eval; to all images through the batch's statistics in training, as in timm."""
    unit = ROADS[road]()
    x = torch.randn(3, 8, 6, 5)
    x[1, 2, 3, 4] = float("nan")
    assert unit.eval()(x).isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert unit.train()(x).isnan().flatten(1).any(1).all()


def test_mixed_dtypes_under_autocast_are_cast():
    unit, _ = pair(in_channels=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unit(torch.randn(2, 8, 5, 5).bfloat16()).dtype == torch.bfloat16


BAD_ATTENTION_INPUT = {
    "rank": (lambda x: x[0], ValueError, "x: expected shape"),
    "branches": (lambda x: x[:, :1], ValueError, r"x: expected shape \(B, 2, C, H, W\), got \(4, 1, 6, 5, 4\)"),
    "channels": (lambda x: x[:, :, :5], ValueError, "fc_reduce: expected shape"),
    "integers": (lambda x: x.int(), TypeError, "x: expected a floating-point tensor, got torch.int32"),
    "dtype": (lambda x: x.double(), TypeError, "x: expected torch.float32.*got torch.float64"),
    "device": (lambda x: x.to("meta"), ValueError, "x: expected a tensor on cpu.*got one on meta"),
    "one image": (lambda x: x[:1], ValueError, "Expected more than 1 value per channel when training"),
}


@pytest.mark.parametrize("case", BAD_ATTENTION_INPUT)
def test_bad_input_of_the_attention(case: str):
    change, error, says = BAD_ATTENTION_INPUT[case]
    attn = FusedSelectiveKernelAttn(6, attn_channels=3)
    before = state(attn)
    with pytest.raises(error, match=says):
        attn(change(torch.randn(4, 2, 6, 5, 4)))
    assert_same_state(before, attn.state_dict())


def operands() -> dict:
    """Arguments of `functional.selective_kernel`: 2 branches, B = 3, C = 4, D = 5, in training."""

    def norm(length: int) -> BatchNorm:
        return BatchNorm(torch.ones(length), torch.zeros(length), torch.zeros(length), torch.ones(length), training=True)

    branches = [torch.randn(3, 4, 6, 5) for _ in range(2)]
    return dict(branches=branches, norms=[norm(4), norm(4)], fc_reduce=torch.randn(5, 4), attn_norm=norm(5), fc_select=torch.randn(8, 5))


BAD_OPERANDS = {
    "no branches": (dict(branches=lambda ys: []), ValueError, "branches: expected at least one"),
    "stacked": (dict(branches=lambda ys: torch.stack(ys)), TypeError, r"branches: expected a list of tensors, got one tensor of shape \(2, 3, 4, 6, 5\)"),
    "rank": (dict(branches=lambda ys: [y[0] for y in ys]), ValueError, "branches: expected shape"),
    "shapes differ": (dict(branches=lambda ys: [ys[0], ys[1][:, :, 1:]]), ValueError, "branches: expected one shape and device"),
    "devices differ": (dict(branches=lambda ys: [ys[0], ys[1].to("meta")]), ValueError, "branches: expected one shape and device.*meta"),
    "dtypes differ": (dict(branches=lambda ys: [ys[0], ys[1].half()]), TypeError, "branches: expected one dtype.*float16"),
    "integers": (dict(branches=lambda ys: [y.long() for y in ys]), TypeError, "int64"),
    "empty": (dict(branches=lambda ys: [y[:0] for y in ys]), ValueError, "branches: expected at least one value"),
    "too few norms": (dict(norms=lambda norms: norms[:1]), ValueError, "norms: expected one for each of the 2 branches, got 1"),
    "one norm": (dict(norms=lambda norms: norms[0]), TypeError, "norms: expected a list .* of the 2 branches, got one BatchNorm"),
    "norms differ": (dict(norms=lambda norms: [norms[0], norms[1]._replace(eps=1e-3)]), ValueError, "norms: .*eps=0.001"),
    "weight": (dict(norms=lambda norms: [norms[0], norms[1]._replace(weight=torch.ones(1))]), ValueError, r"norms: expected weight of shape \(4,\)"),
    "bias on a device": (dict(norms=lambda norms: [norms[0]._replace(bias=torch.ones(4, device="meta")), norms[1]]), ValueError, "norms: expected bias.*meta"),
    "running_var": (dict(norms=lambda norms: [norms[0], norms[1]._replace(running_var=torch.ones(5))]), ValueError, "norms: expected running_var"),
    "no running_var": (dict(norms=lambda norms: [norms[0], norms[1]._replace(running_var=None)]), ValueError, "norms: .*None for running_var"),
    "no statistics": (dict(attn_norm=lambda norm: norm._replace(running_mean=None, running_var=None, training=False)), ValueError, "attn_norm: .*None for"),
    "attention's mean": (dict(attn_norm=lambda norm: norm._replace(running_mean=torch.ones(4))), ValueError, "attn_norm: expected running_mean"),
    "fc_reduce": (dict(fc_reduce=lambda fc: fc[:, :3]), ValueError, r"fc_reduce: expected shape \(D, 4\).*got \(5, 3\)"),
    "fc_select": (dict(fc_select=lambda fc: fc[:7]), ValueError, r"fc_select: expected shape \(2 \* 4, 5\).*got"),
    "fc_select on a device": (dict(fc_select=lambda fc: fc.to("meta")), ValueError, "fc_select: expected a tensor on cpu, got one on meta"),
    "activation": (dict(activation=lambda _: "gelu"), ValueError, "activation: expected one of.*got 'gelu'"),
}


@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_bad_operand_of_the_function_is_named_and_changes_nothing(case: str, backend: str):
    changes, error, says = BAD_OPERANDS[case]
    arguments = operands()
    norms = [*arguments["norms"], arguments["attn_norm"]]
    before = [copy.deepcopy(norm[:4]) for norm in norms]
    with pytest.raises(error, match=says):
        selective_kernel(**{**arguments, **{name: change(arguments.get(name)) for name, change in changes.items()}})
    for norm, old in zip(norms, before):
        assert all(torch.equal(a, b) for a, b in zip(norm[:4], old))


NORMS = {
    "plain": nn.BatchNorm2d(4),
    "eps, momentum": nn.BatchNorm2d(4, eps=0.1, momentum=0.4),
    "momentum None": nn.BatchNorm2d(4, momentum=None),
    "not affine": nn.BatchNorm2d(4, affine=False),
    "no statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "statistics that do not move": nn.BatchNorm2d(4),
    "3d": nn.BatchNorm3d(4),
    "frozen": timm.layers.FrozenBatchNormAct2d(4, apply_act=False),
}
NORMS["statistics that do not move"].track_running_stats = False


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_of_a_layer(name: str, mode: bool):
    """What the layer itself gives and becomes, batch by batch."""
    ours, theirs = (copy.deepcopy(NORMS[name]).train(mode) for _ in range(2))
    shape = (3, 4, 5, 2, 2)[: 5 if name == "3d" else 4]
    for _ in range(3):
        x = torch.randn(shape)
        y = sk_fused.reference.normalize(x, BatchNorm.of(ours))
        count_batches(ours)
        torch.testing.assert_close(y, theirs(x))
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize("module", [nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.GroupNorm(2, 4), nn.Identity()])
def test_batch_norm_of_another_layer(module: nn.Module):
    with pytest.raises(TypeError, match=f"module: expected BatchNorm1d, .*, got {type(module).__name__}"):
        BatchNorm.of(module)


def test_bad_operands_of_attend():
    fc_reduce, norm, fc_select = (operands()[name] for name in ("fc_reduce", "attn_norm", "fc_select"))
    bad = {
        torch.randn(3): (ValueError, r"s: expected shape \(B, C\), got \(3,\)"),
        torch.ones(3, 4).long(): (TypeError, "int64"),
        torch.ones(0, 4): (ValueError, r"s: expected at least one image in training, got shape \(0, 4\)"),
    }
    for s, (error, says) in bad.items():
        with pytest.raises(error, match=says):
            attend(s, fc_reduce, norm, fc_select)
    assert not norm.running_mean.any()
    with sk_fused.use_backend("reference"):
        assert attend(torch.ones(0, 4), fc_reduce, norm._replace(training=False), fc_select).shape == (0, 2, 4)


def test_a_backend_is_forced_again():
    forced, x = sk_fused.use_backend("reference"), torch.ones(1, 1, 1, 1)
    for _ in range(2):
        with forced:
            assert sk_fused.backends.choose([x]) is sk_fused.backends.reference
        assert sk_fused.backends.choose([x]) is sk_fused.backends.native


def test_forced_backends(monkeypatch: pytest.MonkeyPatch):
    unit, _ = pair(in_channels=8)
    x = torch.randn(2, 8, 5, 5)
    with pytest.raises(ValueError, match="name: expected None or one of native, triton, reference, got 'cuda0'"):
        sk_fused.use_backend("cuda0")
    monkeypatch.setattr(sk_fused.backends.native, "_C", None)
    monkeypatch.setattr(sk_fused.backends.native, "_missing", "the native extension is not there: for a test", raising=False)
    before = state(unit)
    with sk_fused.use_backend("native"), pytest.raises(RuntimeError, match="'native' was forced, but the native extension is not there"):
        unit(x)
    assert_same_state(before, unit.state_dict())
    with pytest.warns(RuntimeWarning, match="plain PyTorch reference, because the native extension is not there.*; the Triton kernels run on a GPU") as said:
        unit(x), unit(x)
    assert len(said) == 1
    with sk_fused.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        unit(x)


def test_backend_is_forced_from_the_call_on_and_inside_a_with():
    chosen = lambda: sk_fused.backends.choose([torch.ones(1, 1, 1, 1)]).__name__.rpartition(".")[2]  # noqa: E731
    assert chosen() == "native"
    sk_fused.use_backend("reference")
    assert chosen() == "reference"
    with sk_fused.use_backend("native"):
        assert chosen() == "native"
    assert chosen() == "reference"
    sk_fused.use_backend(None)
    assert chosen() == "native"


def test_a_unit_on_the_meta_device_has_shapes():
    with sk_fused.use_backend("reference"):
        assert FusedSelectiveKernel(8, 12, stride=2, device="meta")(torch.randn(2, 8, 9, 9, device="meta")).shape == (2, 12, 5, 5)
