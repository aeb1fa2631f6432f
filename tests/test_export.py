"""torch.export, AOTInductor, ONNX and TorchScript: what leaves Python, and what it needs where it runs."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sk_fused

from .parity import assert_within, pair

# The two roads: convolutions of PyTorch's, and of the package's own; and a unit that is not wholly fused.
UNITS = {
    "split": dict(in_channels=16, keep_3x3=False),
    "groups": dict(in_channels=16, groups=4, split_input=False),
    "not fused": dict(in_channels=16, act_layer=nn.GELU),
}
ANY_BATCH = ({0: torch.export.Dim("batch", min=2, max=64)},)


@pytest.fixture(params=UNITS)
def units(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, in eval, inside a network."""
    ours, theirs = pair(**UNITS[request.param])
    return nn.Sequential(ours, nn.Conv2d(16, 3, 1)).eval(), nn.Sequential(theirs, nn.Conv2d(16, 3, 1)).eval()


def assert_agrees(output: Tensor, units: tuple[nn.Module, nn.Module], x: Tensor) -> None:
    """With timm's, by the rule; the networks differ in their last layer's weights."""
    units[1][1].load_state_dict(units[0][1].state_dict())
    with torch.no_grad():
        assert_within("output", output.detach(), units[1](x), copy.deepcopy(units[1]).double()(x.double()))


def in_fresh_process(code: str, *arguments: Path) -> None:
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.filterwarnings("ignore:sk_fused")
@pytest.mark.parametrize(("strict", "grad"), [(False, False), (False, True), (True, True)])
def test_exported_program_runs_in_a_fresh_process(units: tuple[nn.Module, nn.Module], strict: bool, grad: bool, tmp_path: Path):
    """For a batch of any size. The process needs sk_fused, whose operators the program has; not timm."""
    x, other = torch.randn(3, 16, 6, 5), torch.randn(7, 16, 6, 5)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(units[0], (x,), dynamic_shapes=ANY_BATCH, strict=strict)
    if not grad:
        targets = {str(node.target) for node in program.graph.nodes}
        assert targets & {"sk_fused.unit.default", "sk_fused.select.default"}
    assert_agrees(program.module()(other), units, other)
    if strict:
        return
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(other, tmp_path / "x.pt")
    code = (
        "import sys, torch, sk_fused; program, x, v = sys.argv[1:];"
        "torch.save(torch.export.load(program).module()(torch.load(x)), v); assert 'timm' not in sys.modules"
    )
    in_fresh_process(code, *(tmp_path / name for name in ("program.pt2", "x.pt", "v.pt")))
    assert_agrees(torch.load(tmp_path / "v.pt"), units, other)


def test_a_batch_of_any_size_is_exported_where_eager_mode_takes_a_few_images_at_once():
    unit = sk_fused.FusedSelectiveKernel(64, 128, stride=2).eval()
    x = torch.randn(8, 64, 56, 56)
    assert unit._images_in_cache(x) < 8
    with torch.no_grad():
        program = torch.export.export(unit, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        torch.testing.assert_close(program.module()(x[:3]), unit(x[:3]))


@pytest.mark.filterwarnings("ignore:sk_fused")
def test_exported_program_has_no_gradients_and_says_so(units: tuple[nn.Module, nn.Module]):
    program = torch.export.export(units[0].train(), (torch.randn(3, 16, 6, 5),))
    v = program.module()(torch.randn(3, 16, 6, 5))
    with pytest.raises(RuntimeError, match="derivative for sk_fused::.* is not implemented"):
        v.sum().backward()
    with sk_fused.use_backend("reference"):
        program = torch.export.export(units[0], (torch.randn(3, 16, 6, 5),))
    exported = program.module()
    exported(torch.randn(3, 16, 6, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in exported.parameters())


@pytest.mark.parametrize("name", ["split", "groups"])
def test_aot_inductor_package_runs_in_a_fresh_process(name: str, tmp_path: Path):
    ours, theirs = (unit.eval() for unit in pair(**UNITS[name]))
    x = torch.randn(3, 16, 6, 5)
    with torch.no_grad():
        program = torch.export.export(ours, (x,))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "unit.pt2"))
    torch.save(x, tmp_path / "x.pt")
    code = "import sys, torch, sk_fused; unit, x, v = sys.argv[1:]; torch.save(torch._inductor.aoti_load_package(unit)(torch.load(x)), v)"
    in_fresh_process(code, *(tmp_path / name for name in ("unit.pt2", "x.pt", "v.pt")))
    assert_within("output", torch.load(tmp_path / "v.pt"), theirs(x).detach(), theirs.double()(x.double()).detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_runtime_agrees(units: tuple[nn.Module, nn.Module], dynamo: bool, tmp_path: Path):
    """The exporter is given the reference: the model has no operator of sk_fused."""
    x, path = torch.randn(3, 16, 6, 5), tmp_path / "network.onnx"
    torch.onnx.export(units[0], (x,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (v,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    units[1][1].load_state_dict(units[0][1].state_dict())
    numpy.testing.assert_allclose(v, units[1](x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torchscript(units: tuple[nn.Module, nn.Module], tmp_path: Path):
    """A trace is made of PyTorch's operators; a script is timm's unit. Neither needs sk_fused, and our unit stays as it is."""
    x = torch.randn(3, 16, 6, 5)
    for name, scripted in (("trace", torch.jit.trace(units[0], x)), ("script", torch.jit.script(copy.deepcopy(units[0])))):
        scripted.save(tmp_path / f"{name}.pt")
        assert "sk_fused::" not in str(scripted.inlined_graph)
        assert_agrees(torch.jit.load(tmp_path / f"{name}.pt")(x), units, x)
    unit = units[0][0]
    torch.jit.script(unit)
    assert type(unit) is sk_fused.FusedSelectiveKernel and type(unit.attn) is sk_fused.FusedSelectiveKernelAttn


def test_pickle_and_copy(tmp_path: Path):
    for unit in (pair(**UNITS["groups"])[0].eval(), pair(**UNITS["split"])[0].eval()):
        torch.save(unit, tmp_path / "unit.pt")
        x = torch.randn(3, 16, 6, 5)
        for other in (copy.deepcopy(unit), torch.load(tmp_path / "unit.pt", weights_only=False)):
            assert torch.equal(other(x), unit(x))
