"""What users do with a module: checkpointing, EMA, torch.func, hooks, freezing, fusing, moving, differentiating twice."""

import copy
import sys
from functools import partial

import pytest
import torch
from timm.models import checkpoint_seq
from timm.utils import ModelEmaV3, freeze
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sk_fused
from sk_fused.backends import native, reference

from .parity import LAYOUTS, assert_parity, assert_within, batches, pair, step

# The two roads: convolutions of PyTorch's, and of the package's own.
UNITS = {"split": dict(in_channels=16), "groups": dict(in_channels=16, groups=4, split_input=False)}


class Checkpointed(nn.Module):
    def __init__(self, unit: nn.Module, **options: bool):
        super().__init__()
        self.unit, self.options = unit, options

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.unit, x, **self.options)


@pytest.mark.parametrize("options", [dict(use_reentrant=True), dict(use_reentrant=False)], ids=str)
@pytest.mark.parametrize("name", UNITS)
def test_checkpointing_changes_nothing_and_moves_the_running_statistics_once(name: str, options: dict, backend: str):
    """PyTorch's batch-norm, and so timm's unit, moves them again as it recomputes."""
    momentum_none = partial(nn.BatchNorm2d, momentum=None)
    ours, theirs = pair(norm_layer=momentum_none, **UNITS[name])
    x, g = torch.randn(3, 16, 6, 5), torch.randn(3, 16, 6, 5)
    checkpointed, plain, timm = Checkpointed(copy.deepcopy(ours), **options), ours, Checkpointed(theirs, **options)
    results = [step(unit, x, g, torch.enable_grad()) for unit in (checkpointed, plain, timm)]
    for key, value in results[1].items():
        assert torch.equal(results[0][key if key in ("output", "x.grad") else f"unit.{key}"], value), key
    assert results[0]["unit.attn.bn.num_batches_tracked"] == 1 and results[2]["unit.attn.bn.num_batches_tracked"] == 2


def test_timms_checkpoint_seq():
    units = nn.Sequential(*(pair(**UNITS["split"])[0] for _ in range(3)))
    x, g = torch.randn(3, 16, 6, 5), torch.randn(3, 16, 6, 5)
    plain = step(copy.deepcopy(units), x, g, torch.enable_grad())
    leaf = x.clone().requires_grad_()
    checkpoint_seq(units, leaf).backward(g)
    assert torch.equal(leaf.grad, plain["x.grad"])
    assert all(torch.equal(buffer, plain[name]) for name, buffer in units.named_buffers())


def test_exponential_moving_average():
    emas = []
    for unit in pair(**UNITS["split"]):
        ema = ModelEmaV3(unit, decay=0.5)
        for parameter in unit.parameters():
            parameter.data.add_(1)
        unit(torch.randn(3, 16, 5, 5, generator=torch.Generator().manual_seed(0)))
        ema.update(unit)
        emas.append(ema.module)
    assert isinstance(emas[0], sk_fused.FusedSelectiveKernel)
    for (name, ours), (_, theirs) in zip(emas[0].state_dict().items(), emas[1].state_dict().items(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("name", UNITS)
def test_functional_call_uses_the_tensors_it_is_given(name: str):
    ours, other = pair(**UNITS[name])[0], pair(**UNITS[name])[0]
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(3, 16, 5, 5)
    assert torch.equal(torch.func.functional_call(ours, state, (x,)), other(x))
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("name", UNITS)
def test_vmap_over_batches_and_gradients_of_each_image(name: str):
    ours, theirs = (unit.eval() for unit in pair(**UNITS[name]))
    x = torch.randn(4, 1, 16, 5, 6)

    def loss(unit: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(unit, parameters, (x,)).square().sum()

    def run(unit: nn.Module, x: Tensor) -> dict[str, Tensor]:
        gradients = torch.func.vmap(torch.func.grad(partial(loss, unit)), (None, 0))(dict(unit.named_parameters()), x)
        return {"output": torch.func.vmap(unit)(x), **gradients}

    with pytest.warns(RuntimeWarning, match="torch.func"):
        results = [run(unit, x) for unit in (ours, theirs)]
    for (key, value), expected, exact in zip(results[0].items(), results[1].values(), run(copy.deepcopy(theirs).double(), x.double()).values(), strict=True):
        assert_within(key, value.detach(), expected.detach(), exact.detach())
    with sk_fused.use_backend("native"), pytest.raises(RuntimeError, match="'native' was forced, but torch.func"):
        torch.func.vmap(ours)(x)


@pytest.mark.filterwarnings("ignore:sk_fused")
@pytest.mark.parametrize("name", UNITS)
def test_an_ensemble_is_trained_under_vmap(name: str):
    """Units of one shape, their parameters and running statistics stacked."""
    x, states = torch.randn(3, 4, 16, 5, 6), []
    pairs = [pair(**UNITS[name]) for _ in range(3)]
    for units in (*zip(*pairs), [copy.deepcopy(theirs).double() for _, theirs in pairs]):
        parameters, buffers = torch.func.stack_module_state([*units])

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, unit: nn.Module = units[0]) -> Tensor:
            return torch.func.functional_call(unit, (parameters, buffers), (x,))

        v = torch.func.vmap(run)(parameters, buffers, x.to(next(iter(parameters.values())).dtype))
        states.append({"output": v.detach(), **buffers})
    for key, value in states[0].items():
        assert_within(key, value, states[1][key], states[2][key])


def test_batch_of_one_where_a_hook_brings_the_norm():
    """As offloaded and partitioned weights are brought."""
    ours, theirs = (unit.eval() for unit in pair(**UNITS["split"]))
    x = torch.randn(1, 16, 5, 6)
    expected, bn = theirs(x), ours.attn.bn
    weight, bn.weight = bn.weight, nn.Parameter(torch.empty(0))
    bn.register_forward_pre_hook(lambda *_: setattr(bn, "weight", weight))
    with pytest.warns(RuntimeWarning, match="hooks"):
        torch.testing.assert_close(ours(x), expected)


def test_forward_mode_derivative():
    ours, theirs = (unit.double().eval() for unit in pair(**UNITS["split"]))
    x, tangent = torch.randn(2, 2, 16, 4, 5, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="forward-mode"):
        for ours_out, theirs_out in zip(torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(theirs, (x,), (tangent,)), strict=True):
            torch.testing.assert_close(ours_out, theirs_out)


HOOKED = ["paths.0", "paths.0.conv", "paths.0.bn", "paths.1.bn.act", "paths.1.bn.drop", "attn", "attn.fc_reduce", "attn.bn", "attn.act", "attn.fc_select"]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("where", HOOKED)
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.filterwarnings("ignore:sk_fused")
def test_hooks_fire(name: str, where: str, register: str):
    """On every layer, as with timm; the unit says if it is not fused for it, and is fused again when the hook is gone."""
    calls = []
    for unit in pair(**UNITS[name]):
        for module in unit.modules():
            if isinstance(module, nn.ReLU):
                # PyTorch's backward hooks do not go with layers that work in place.
                module.inplace = False
        fired: list[str] = []
        handle = getattr(unit.get_submodule(where), register)(lambda *_: fired.append(where))
        v = unit(torch.randn(3, 16, 5, 5, requires_grad=True, generator=torch.Generator().manual_seed(0)))
        v.sum().backward()
        calls.append((fired, v.detach()))
        if isinstance(unit, sk_fused.FusedSelectiveKernel):
            # PyTorch's convolutions are called as they are: that is the other road, and not unfused.
            assert where == "paths.0.conv" or "hooks" in unit.why_not()
            handle.remove()
            assert unit.why_not() is None
    assert calls[0][0] == calls[1][0] == [where]
    torch.testing.assert_close(calls[0][1], calls[1][1])


def test_hooks_on_all_modules_fire():
    """As those of FLOP counters and module trackers."""
    names = []
    for unit in pair(**UNITS["groups"]):
        called: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__.removeprefix("Fused")))
        try:
            if isinstance(unit, sk_fused.FusedSelectiveKernel):
                with pytest.warns(RuntimeWarning, match="hooks are registered on all modules"):
                    unit(torch.randn(3, 16, 5, 5))
            else:
                unit(torch.randn(3, 16, 5, 5))
        finally:
            handle.remove()
        names.append(called)
    assert names[0] == names[1] and "ReLU" in names[0]


@pytest.mark.filterwarnings("ignore:sk_fused")
def test_flop_counter_and_pruning():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for unit in pair(**UNITS["groups"]):
        with FlopCounterMode(display=False) as counter:
            unit(torch.randn(3, 16, 5, 5))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    x, g = torch.randn(3, 16, 5, 5), torch.randn(3, 16, 5, 5)
    results = []
    for unit in pair(**UNITS["groups"]):
        for layer in (unit.paths[0].conv, unit.attn.fc_select):
            prune.l1_unstructured(layer, "weight", 0.5)
        results.append(step(unit, x, g, torch.enable_grad()))
    assert "paths.0.conv.weight_orig.grad" in results[0]
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-4, atol=1e-5, msg=key)


class _WritingPasses(TorchDispatchMode):
    """Counts them."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function in (native.select_backward, native.branch_backward)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", UNITS)
def test_frozen_parameters_get_no_gradient_and_cost_no_pass(name: str):
    """The writing pass of the backward is for the branches' gradients alone."""
    ours, theirs = pair(**UNITS[name])
    exact = copy.deepcopy(theirs).double()
    for unit in (ours, theirs, exact):
        for key, parameter in unit.named_parameters():
            parameter.requires_grad_(".conv." not in key)
    x = torch.randn(3, 16, 5, 5)
    with _WritingPasses() as passes:
        for unit in (ours, theirs):
            unit(x).square().sum().backward()
    assert not passes.calls
    exact(x.double()).square().sum().backward()
    for (key, parameter), *others in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        gradients = [p.grad for p in (parameter, *others)]
        assert {gradient is None for gradient in gradients} == {".conv." in key}
        if parameter.grad is not None:
            assert_within(key, *gradients)
    with _WritingPasses() as passes:
        ours(x.requires_grad_()).sum().backward()
    assert passes.calls == 1


def test_nothing_is_kept_of_a_unit_whose_parameters_are_frozen():
    ours, _ = pair(**UNITS["split"])
    v = ours.requires_grad_(False)(torch.randn(3, 16, 5, 5))
    assert not v.requires_grad and v.grad_fn is None


def test_a_frozen_unit_in_eval_is_one_operator(monkeypatch: pytest.MonkeyPatch):
    """With gradients enabled, but none to compute: in Python as in C++."""
    ours, _ = (unit.eval().requires_grad_(False) for unit in pair(**UNITS["groups"]))
    x, one, calls = torch.randn(3, 16, 5, 5), reference.unit, []
    monkeypatch.setattr(reference, "unit", lambda *arguments: calls.append(1) or one(*arguments))
    with sk_fused.use_backend("reference"):
        v = ours(x)
        with torch.no_grad():
            assert torch.equal(v, ours(x)) and len(calls) == 2
        assert ours(x.requires_grad_()).requires_grad and len(calls) == 2
    torch.testing.assert_close(ours(x.detach()), v)


@pytest.mark.filterwarnings("ignore:sk_fused")
def test_fused_batch_norms():
    """torch.nn.utils.fusion folds a batch-norm into its convolution; what is left of it is the activation."""
    ours, theirs = (unit.eval() for unit in pair(**UNITS["split"]))
    x = torch.randn(3, 16, 5, 5)
    expected = theirs(x)
    for path in ours.paths:
        path.conv, path.bn = nn.utils.fusion.fuse_conv_bn_eval(path.conv, path.bn), path.bn.act
    assert "norm layer ReLU" in ours.why_not()
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moves_between_layouts_devices_and_dtypes(layout: str):
    ours, theirs = (unit.eval() for unit in pair(**UNITS["groups"]))
    ours = ours.to(memory_format=torch.channels_last).to(memory_format=LAYOUTS[layout])
    assert_parity(ours, theirs, batches(1, (3, 16, 6, 5), layout=layout))
    with pytest.warns(RuntimeWarning, match="on meta"):
        v = copy.deepcopy(ours).to("meta")(torch.empty(3, 16, 6, 5, device="meta"))
    assert v.device.type == "meta" and v.shape == (3, 16, 6, 5)
    back = copy.deepcopy(ours).to("meta").to_empty(device="cpu")
    back.load_state_dict(ours.state_dict())
    assert_parity(back, theirs.to(memory_format=LAYOUTS[layout]), batches(1, (3, 16, 6, 5), layout=layout))


def test_gradient_penalty(backend: str):
    """A loss of gradients, from either backend; tests/test_parity.py differentiates everything twice."""
    results = []
    for unit in pair(torch.float64, **UNITS["split"]):
        x = torch.randn(3, 16, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (dx,) = torch.autograd.grad(unit(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        results.append([x.grad, *(p.grad for p in unit.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_derivative_along_the_gradient_is_not_lost():
    """Forward mode through a backward that is not to be differentiated: the native one has no tangents, and says so."""
    unit, x = sk_fused.FusedSelectiveKernel(16), torch.randn(2, 16, 5, 6, requires_grad=True)
    v = unit(x)
    with forward_ad.dual_level():
        g = forward_ad.make_dual(torch.ones_like(v), torch.ones_like(v))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.autograd.grad(v, x, g)


def replica(module: nn.Module) -> nn.Module:
    """As torch.nn.DataParallel makes them, one for each GPU: the parameters are plain tensors."""
    copies = {of: of._replicate_for_data_parallel() for of in module.modules()}
    for of, made in copies.items():
        for name, child in of._modules.items():
            made._modules[name] = None if child is None else copies[child]
        for name, parameter in of._parameters.items():
            if parameter is None:
                made._parameters[name] = None
            else:
                setattr(made, name, parameter.clone())
    return copies[module]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", UNITS)
def test_replicas_of_data_parallel(name: str, mode: str):
    unit, _ = pair(**UNITS[name])
    x = torch.randn(3, 16, 6, 5)
    expected = copy.deepcopy(unit).train(mode == "train")(x)
    assert torch.equal(replica(unit.train(mode == "train"))(x), expected)


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("made", ["fused", "made here"])
def test_frozen_batch_norms_of_timm(name: str, made: str):
    """Their parameters are buffers; they are fused, and train nothing."""
    ours, theirs = pair(**UNITS[name])
    if made == "fused":
        ours = copy.deepcopy(theirs)
        sk_fused.fuse(ours)
    for unit in (ours, theirs):
        freeze(unit)
    assert ours.why_not() is None
    assert_parity(ours.train(), theirs.train(), [torch.randn(3, 16, 6, 5)])


@pytest.mark.filterwarnings("ignore:sk_fused")
def test_a_unit_made_before_timm_keeps_its_activation_when_it_is_frozen(monkeypatch: pytest.MonkeyPatch):
    """timm does not know its norms, and puts one without an activation in their place."""
    with monkeypatch.context() as before_timm:
        before_timm.delitem(sys.modules, "timm.layers")
        ours, theirs = pair(**UNITS["split"])
    for unit in (ours, theirs):
        freeze(unit)
    assert "FrozenBatchNorm2d" in ours.why_not()
    x = torch.randn(3, 16, 6, 5)
    assert_parity(ours.train(), theirs.train(), [x])
    exact = ours(x)
    sk_fused.unfuse(ours)
    torch.testing.assert_close(ours(x), exact)


def test_a_pruned_batch_norm_of_the_attention_takes_one_image():
    units = pair(**UNITS["split"])
    for unit in units:
        prune.l1_unstructured(unit.eval().attn.bn, "weight", 0.5)
    x = torch.randn(1, 16, 6, 5)
    with pytest.warns(RuntimeWarning, match="the layers of attn have hooks"):
        torch.testing.assert_close(units[0](x), units[1](x))


def test_a_parametrised_convolution_is_evaluated_once():
    """A spectral norm takes a step of its power iteration whenever it is."""
    units = pair(**UNITS["groups"])
    for unit in units:
        torch.manual_seed(3)
        nn.utils.parametrizations.spectral_norm(unit.paths[0].conv)
    x = torch.randn(3, 16, 6, 5)
    torch.testing.assert_close(units[0](x), units[1](x))
    torch.testing.assert_close(units[0].state_dict(), units[1].state_dict())
