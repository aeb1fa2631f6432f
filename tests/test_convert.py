"""fuse and unfuse: in place, with the same Parameters and checkpoints, on units and on whole networks."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import ConvNormAct, SelectiveKernel
from timm.layers.selective_kernel import SelectiveKernelAttn
from torch import nn

import sk_fused
from sk_fused import FusedSelectiveKernel, FusedSelectiveKernelAttn, modules

from .parity import assert_all_within, batches, step
from .test_modules import assert_same_state, saved_and_loaded, state


class Net(nn.Module):
    """A network with units of several kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(SelectiveKernel(8), SelectiveKernel(8, act_layer=nn.GELU))
        self.attn = SelectiveKernelAttn(8)
        self.again = self.blocks[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.again(self.blocks(self.stem(x)))
        return (self.attn(torch.stack([v, 2 * v], 1)) * torch.stack([v, 2 * v], 1)).sum((1, 3, 4))


class Subclass(SelectiveKernel):
    pass


def test_report():
    net = Net()
    report = sk_fused.fuse(net)
    assert [(unit.name, unit.fused, unit.reason) for unit in report.units] == [
        ("blocks.0", True, None),
        ("blocks.1", True, "paths.0 has the activation GELU"),
        ("attn", True, None),
    ]
    assert str(report).splitlines() == ["blocks.0  fused", "blocks.1  attention only  paths.0 has the activation GELU", "attn      fused"]
    net.blocks[0].attn.act = nn.GELU()
    assert str(sk_fused.fuse(net)).splitlines()[0] == "blocks.0  not fused  attn.act is a GELU"
    assert [unit.fused for unit in sk_fused.unfuse(net).units] == [False, False, False]
    assert str(sk_fused.fuse(nn.Linear(2, 2))) == "no SelectiveKernel found"


def test_in_place_and_back():
    net = Net()
    before, keys = dict(net.named_parameters()), state(net)
    classes = [type(module) for module in net.modules()]
    sk_fused.fuse(net)
    assert [type(net.blocks[0]), type(net.blocks[0].attn), type(net.attn)] == [FusedSelectiveKernel, FusedSelectiveKernelAttn, FusedSelectiveKernelAttn]
    assert net.again is net.blocks[0]
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert_same_state(keys, net.state_dict())
    sk_fused.fuse(net)
    sk_fused.unfuse(net)
    assert [type(module) for module in net.modules()] == classes
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert_same_state(keys, net.state_dict())


def test_a_unit_itself():
    unit = SelectiveKernel(8)
    (entry,) = sk_fused.fuse(unit).units
    assert entry == ("", True, None) and type(unit) is FusedSelectiveKernel


def test_what_is_not_fused_is_reported_once_by_the_name_of_the_module():
    net = nn.Sequential(*(SelectiveKernel(8, act_layer=act) for act in (nn.GELU, nn.ReLU, nn.GELU)), SelectiveKernel(8))
    net[3].attn.act = nn.GELU()
    report = sk_fused.fuse(net)
    reasons = ["paths.0 has the activation GELU", None, "paths.0 has the activation GELU", "attn.act is a GELU"]
    assert [(unit.name, unit.reason) for unit in report.units] == [*zip("0123", reasons)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            net(torch.randn(2, 8, 5, 5))
    assert [str(warning.message) for warning in said if "sk_fused" in str(warning.message)] == [
        "sk_fused fuses only the attention of the SelectiveKernel 0: paths.0 has the activation GELU",
        "sk_fused fuses only the attention of the SelectiveKernel 2: paths.0 has the activation GELU",
        "sk_fused runs the SelectiveKernel 3 unfused: attn.act is a GELU",
    ]
    sk_fused.unfuse(net)
    assert not any("name_in_model" in module.__dict__ for module in net.modules())


def test_checkpoints_load_strictly_both_ways():
    fused, plain = Net(), Net()
    sk_fused.fuse(fused)
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)


def test_what_is_not_timms_own_is_left_alone():
    subclass, other_attn, inner = Subclass(8), SelectiveKernel(8), SelectiveKernel(8)
    other_attn.attn = nn.Identity()
    inner.attn.__class__ = type("Attn", (SelectiveKernelAttn,), {})
    report = sk_fused.fuse(nn.ModuleList([subclass, other_attn, inner]))
    assert [(unit.fused, unit.reason) for unit in report.units] == [
        (False, "Subclass is a subclass of SelectiveKernel"),
        (False, "attn is a Identity"),
        (False, "attn is a Attn"),
    ]
    assert [type(subclass), type(other_attn), type(inner)] == [Subclass, SelectiveKernel, SelectiveKernel]


def test_a_subclass_of_the_fused_unit_is_what_its_forward_is():
    """FSDP, too, makes subclasses."""

    class Same(FusedSelectiveKernel):
        pass

    class Other(FusedSelectiveKernel):
        def forward(self, x):
            return x

    report = sk_fused.fuse(nn.ModuleList([Same(8), Other(8)]))
    assert [(unit.fused, unit.reason) for unit in report.units] == [(True, None), (False, "Other is a subclass of FusedSelectiveKernel")]


def test_unfuse_of_a_unit_made_here_leaves_nothing_of_ours(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as before_timm:
        before_timm.delitem(sys.modules, "timm.layers")
        unit = FusedSelectiveKernel(8)
    assert type(unit.paths[0]) is modules.ConvNormAct
    x = torch.randn(3, 8, 6, 6)
    exact = unit.eval()(x)
    sk_fused.unfuse(unit)
    assert type(unit) is SelectiveKernel and type(unit.paths[0]) is ConvNormAct
    assert b"sk_fused" not in pickle.dumps(unit)
    torch.testing.assert_close(unit(x), exact)
    sk_fused.fuse(unit)
    assert unit.why_not() is None


def test_unfuse_keeps_the_activation_that_torchs_converter_has_hidden():
    unit = SelectiveKernel(8).eval()
    sk_fused.fuse(unit)
    unit = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
    x = torch.randn(3, 8, 6, 5)
    exact = unit(x)
    sk_fused.unfuse(unit)
    torch.testing.assert_close(unit(x), exact)
    assert unit.paths[0].bn(x).min() >= 0


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.01, momentum=0.9), torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_an_optimizer_made_before_goes_on(optimizer):
    net = Net().double()
    twin = copy.deepcopy(net)
    xs = batches(4, (6, 3, 9, 9), torch.float64)
    for model, fuses in ((net, True), (twin, False)):
        optimize = optimizer(model.parameters())
        for i, x in enumerate(xs):
            if fuses and i == 1:
                sk_fused.fuse(model)
            if fuses and i == 3:
                sk_fused.unfuse(model)
            optimize.zero_grad()
            with pytest.warns(RuntimeWarning, match="GELU") if fuses and i == 1 else torch.enable_grad():
                model(x).square().mean().backward()
            optimize.step()
    for (name, ours), theirs in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:sk_fused")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved_and_loaded], ids=["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_fused_network(copied):
    net = Net()
    sk_fused.fuse(net)
    twin = copied(net)
    x = torch.randn(2, 3, 9, 9)
    assert type(twin.blocks[0]) is FusedSelectiveKernel and twin.again is twin.blocks[0]
    assert torch.equal(net.eval()(x), twin.eval()(x))


def test_weights_saved_before_load_after():
    net, file = Net(), io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    sk_fused.fuse(net)
    net.load_state_dict(torch.load(file, weights_only=True), strict=True)


def run_without_timm(code: str) -> subprocess.CompletedProcess:
    """Python code in a process in which timm cannot be imported."""
    blocked = "import sys; sys.modules['timm'] = sys.modules['torchvision'] = None\n"
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", blocked + code], cwd=root, capture_output=True, text=True)


def test_works_without_timm():
    run = run_without_timm(
        """
import torch, sk_fused
from torch import nn
unit = sk_fused.FusedSelectiveKernel(8, norm_layer=nn.BatchNorm2d, act_layer=nn.SiLU)
assert unit.why_not() is None
x = torch.randn(2, 8, 5, 5, requires_grad=True)
unit(x).sum().backward()
assert x.grad.isfinite().all()
assert str(sk_fused.fuse(nn.Sequential(unit))) == "0  fused"
for fails, says in ((lambda: sk_fused.unfuse(unit), "timm"), (lambda: sk_fused.FusedSelectiveKernel(8, norm_layer=nn.GroupNorm), "needs timm")):
    try:
        fails()
    except ImportError as error:
        assert says in str(error), error
    else:
        raise AssertionError("no ImportError")
assert type(unit) is sk_fused.FusedSelectiveKernel
"""
    )
    assert run.returncode == 0, run.stderr


def test_importing_the_package_imports_no_timm():
    run = subprocess.run([sys.executable, "-c", "import sys, sk_fused; print('timm' in sys.modules, 'torchvision' in sys.modules)"], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"], run.stderr


@pytest.fixture(scope="module", params=["skresnet18", "skresnext50_32x4d"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    """timm's network with running statistics of its own activations."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model(batches(1, (4, 3, 48, 48))[0])
    for norm in norms:
        norm.momentum = 0.1
    return model


def network_results(network: nn.Module, mode: str, x: torch.Tensor, layout: torch.memory_format) -> list[dict[str, torch.Tensor]]:
    fused = copy.deepcopy(network)
    report = sk_fused.fuse(fused)
    assert report.units and all(unit.fused and unit.reason is None for unit in report.units)
    results = []
    for model, dtype in ((fused, torch.float32), (copy.deepcopy(network), torch.float32), (copy.deepcopy(network), torch.float64)):
        model = getattr(model.to(dtype=dtype, memory_format=layout), mode)()
        unit_x = x.to(dtype=dtype, memory_format=layout)
        if mode == "eval":
            with torch.inference_mode():
                results.append({"logits": model(unit_x)})
        else:
            results.append(step(model, unit_x, torch.full((len(x), 10), 0.1), torch.enable_grad()))
    return results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_networks_in_eval(network: nn.Module, layout: torch.memory_format):
    assert_all_within(*network_results(network, "eval", batches(1, (4, 3, 48, 48))[0], layout))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_a_training_step_of_networks(network: nn.Module, activation: type[nn.Module]):
    """All gradients as one vector: through this many layers the rounding of one parameter's gradient is chance. With ReLU
    so is that of all: rounding carries some z across its kink. Its gradients are held unit by unit, in test_parity."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(getattr(module, "act", None), nn.ReLU) and not isinstance(module, SelectiveKernelAttn):
            module.act = activation(inplace=True)
    pooled = []
    for result in network_results(network, "train", batches(1, (6, 3, 48, 48))[0], torch.channels_last):
        gradients = torch.cat([value.flatten() for name, value in result.items() if name.endswith(".grad")])
        statistics = torch.cat([value.flatten() for name, value in result.items() if "running" in name])
        counts = torch.stack([value for name, value in result.items() if "tracked" in name])
        pooled.append({"logits": result["output"], "statistics": statistics, "counts": counts})
        if activation is nn.SiLU:
            pooled[-1]["gradients"] = gradients
    assert_all_within(*pooled)
