"""Whole networks: timm's own cases with the fused class in the place of timm's, timm's options, timm's registry, and
segmentation_models_pytorch. Fused and unfused are compared in float64, where rounding carries no z across a kink: they differ by at
most `CLOSE` of the largest value, a thousand times less than any wrong formula would."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import segmentation_models_pytorch
import timm
import torch
from timm.layers import BlurPool2d, SelectiveKernel
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import sk_fused
import sk_fused.timm
from benchmarks.cases import NETWORKS
from benchmarks.models import settled
from sk_fused import FusedSelectiveKernel

from .parity import batches, step

CLOSE = 1e-10


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm builds its networks of fused units."""
    monkeypatch.setattr(timm.models.sknet, "SelectiveKernel", FusedSelectiveKernel)


def units_of(model: nn.Module) -> list[FusedSelectiveKernel]:
    return [module for module in model.modules() if isinstance(module, FusedSelectiveKernel)]


def create(name: str, **arguments) -> nn.Module:
    """A network of fused units, and of no other."""
    model = timm.create_model(name, **arguments)
    assert len(units_of(model)) == UNITS[name] and not any(isinstance(module, SelectiveKernel) for module in model.modules())
    return model


UNITS = {"skresnet18": 8, "skresnet34": 16, "skresnet50": 16, "skresnet50d": 16, "skresnext50_32x4d": 16}


# timm's tests/test_models.py, case by case, with its sizes.


@pytest.mark.parametrize("name", NETWORKS)
def test_forward(replaced, name: str):
    model = create(name).eval()
    x = torch.randn(1, *model.default_cfg["input_size"])
    logits = model(x)
    assert logits.shape == (1, 1000) and not logits.isnan().any()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_backward(replaced, name: str):
    model = create(name, num_classes=42).train()
    logits = model(torch.randn(2, 3, 128, 128))
    logits.mean().backward()
    assert logits.shape == (2, 42) and not logits.isnan().any()
    assert [parameter_name for parameter_name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", timm.list_models(list(NETWORKS), include_tags=True))
def test_default_cfgs(replaced, name: str):
    model = create(name.split(".")[0]).eval()
    keys, cfg = model.state_dict().keys(), model.default_cfg
    x, pool_size = torch.randn(1, *cfg["input_size"]), cfg["pool_size"]
    with torch.inference_mode():
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *pool_size)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model.num_classes == 0 and model(x).shape == pooled.shape
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape
        assert create(name.split(".")[0], num_classes=0, global_pool="").eval()(x).shape == features.shape
    assert f"{cfg['classifier']}.weight" in keys and f"{cfg['first_conv']}.weight" in keys


def assert_are_features(features: list[Tensor], info: timm.models.FeatureInfo, size: int) -> None:
    assert len(features) == len(info.channels()) >= 3
    for feature, channels, reduction in zip(features, info.channels(), info.reduction()):
        assert feature.shape[:2] == (1, channels) and max(feature.shape[2:]) <= math.ceil(size / reduction) + 1
        assert not feature.isnan().any()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("features_by", [{}, {"feature_cls": "getter"}], ids=["hooks", "getter"])
def test_features(replaced, name: str, features_by: dict):
    model = timm.create_model(name, features_only=True, **features_by).eval()
    assert len(units_of(model)) == UNITS[name]
    assert_are_features(model(torch.randn(1, 3, 96, 96)), model.feature_info, 96)


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_intermediates(replaced, name: str):
    model = create(name).eval()
    x = torch.randn(1, 3, 96, 96)
    final, features = model.forward_intermediates(x)
    assert_are_features(features, timm.models.FeatureInfo(model.feature_info, range(len(model.feature_info))), 96)
    torch.testing.assert_close(final, model.forward_features(x))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], final, rtol=1e-4, atol=1e-5)


def fx_model(model: nn.Module) -> fx.GraphModule:
    """As timm traces, up to the last node."""
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions(), "param_shapes_constant": True}
    train, evaluation = get_graph_node_names(model, tracer_kwargs=dict(tracer))
    return create_feature_extractor(model, train_return_nodes=train[-1:], eval_return_nodes=evaluation[-1:], tracer_kwargs=dict(tracer))


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_fx(replaced, name: str):
    model = create(name).eval()
    x = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        logits = model(x)
        (traced,) = fx_model(model)(x).values()
    assert torch.equal(traced, logits) and not logits.isnan().any()


@pytest.mark.parametrize("name", NETWORKS)
def test_backward_fx(replaced, name: str):
    model = fx_model(create(name, num_classes=42).train())
    (logits,) = model(torch.randn(2, 3, 128, 128)).values()
    logits.mean().backward()
    assert logits.shape == (2, 42) and not logits.isnan().any()
    assert [parameter_name for parameter_name, parameter in model.named_parameters() if parameter.grad is None] == []


# timm scripts all five; two have every layer that they are made of.
@pytest.mark.parametrize("name", ["skresnet18", "skresnext50_32x4d"])
@pytest.mark.parametrize("traced", [False, True], ids=["", "fx"])
def test_torchscript(replaced, name: str, traced: bool):
    with timm.layers.set_scriptable(True):
        model = create(name).eval()
    x = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        script = torch.jit.script(fx_model(model) if traced else model)
        logits = next(iter(script(x).values())) if traced else script(x)
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)


# fx, outside timm's cases.


def test_a_unit_is_one_node_of_any_fx_trace():
    model = timm.create_model("skresnet18").eval()
    sk_fused.fuse(model)
    graph = fx.symbolic_trace(model)
    called = [graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert units_of(nn.ModuleList(called)) == units_of(model)
    attn = nn.Sequential(sk_fused.FusedSelectiveKernelAttn(8))
    stacked = torch.randn(3, 2, 8, 5, 4)
    assert torch.equal(fx.symbolic_trace(attn.eval())(stacked), attn(stacked))
    with pytest.raises(TypeError, match="FusedSelectiveKernel is one node of an fx trace"):
        fx.symbolic_trace(FusedSelectiveKernel(8))


# timm's networks and options, beside timm.


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, right in theirs.items():
        if right.is_floating_point():
            assert (ours[name] - right).abs().max() <= CLOSE * right.abs().max(), name
        else:
            assert torch.equal(ours[name], right), name


class Joined(nn.Module):
    """All that a model returns, as one vector per image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.model(x)
        return torch.cat([output.flatten(1) for output in (outputs if isinstance(outputs, list) else [outputs])], 1)


def assert_fused_is_the_same(model: nn.Module, size: tuple[int, int]) -> list[str | None]:
    """Output in eval, and output, gradients and buffers of a training step. Returns what is not fused of the units, and why."""
    x = batches(1, (4, 3, *size), torch.float64)[0]
    theirs = Joined(settled(model.double(), x))
    ours = copy.deepcopy(theirs)
    report = sk_fused.fuse(ours)
    assert report.units and all(unit.fused for unit in report.units)
    with torch.inference_mode():
        assert_close({"output": ours.eval()(x)}, {"output": theirs.eval()(x)})
    g = torch.randn_like(theirs(x).detach())
    results = [step(network.train(), x, g, torch.enable_grad()) for network in (ours, theirs)]
    assert_close(*results)
    return [unit.reason for unit in report.units]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str):
    assert set(assert_fused_is_the_same(timm.create_model(name, num_classes=10), (48, 48))) == {None}


@pytest.mark.parametrize("size", [(96, 32), (75, 53), (33, 129)], ids=str)
def test_input_sizes(size: tuple[int, int]):
    assert set(assert_fused_is_the_same(timm.create_model("skresnet18", num_classes=10), size)) == {None}


@pytest.mark.parametrize("name", ["skresnet18", "skresnext50_32x4d"])
@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride(name: str, stride: int):
    model = timm.create_model(name, features_only=True, output_stride=stride)
    assert model.feature_info.reduction()[-1] == stride
    assert set(assert_fused_is_the_same(model, (48, 48))) == {None}


@pytest.mark.filterwarnings("ignore:sk_fused fuses only the attention")
def test_drop_block():
    reasons = assert_fused_is_the_same(timm.create_model("skresnet18", num_classes=10, drop_block_rate=0.2), (48, 48))
    assert reasons == [None] * 4 + ["paths.0 has the drop layer DropBlock2d"] * 4


@pytest.mark.filterwarnings("ignore:sk_fused fuses only the attention")
@pytest.mark.parametrize("name", ["skresnet18", "skresnet50d"])
def test_blurpool(name: str):
    reasons = assert_fused_is_the_same(timm.create_model(name, num_classes=10, aa_layer=BlurPool2d), (48, 48))
    assert reasons.count("paths.0 has the anti-aliasing layer BlurPool2d") == 3 and reasons.count(None) == len(reasons) - 3


# Its own encoder of timm's blocks, which it calls deprecated, and the one that is to replace it.
@pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated")
@pytest.mark.parametrize("encoder", ["timm-skresnet34", "tu-skresnet34"])
def test_segmentation_models(encoder: str):
    model = segmentation_models_pytorch.Unet(encoder, encoder_weights=None, classes=3, decoder_channels=(32, 16, 16, 8, 8))
    assert assert_fused_is_the_same(model, (64, 32)) == [None] * 16


@pytest.mark.parametrize("name, millions", [("skresnet18", 11.96), ("skresnet34", 22.28)])
def test_parameter_counts_of_the_card(name: str, millions: float):
    model = timm.create_model(f"fused_{name}")
    assert len(units_of(model)) == UNITS[name]
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


# timm's registry.


@pytest.mark.parametrize("name", NETWORKS)
def test_registry(name: str):
    tags, fused_tags = (timm.list_models(each, include_tags=True) for each in (name, f"fused_{name}"))
    assert fused_tags == [f"fused_{tag}" for tag in tags]
    for tag in (name, *tags):
        ours, theirs = (timm.get_pretrained_cfg(each) for each in (f"fused_{tag}", tag))
        assert vars(ours) == {**vars(theirs), "architecture": f"fused_{name}"}
        assert timm.is_model_pretrained(f"fused_{tag}") == timm.is_model_pretrained(tag)


def test_registry_has_all_of_timms_networks():
    assert timm.list_models("fused_*") == [f"fused_{name}" for name in timm.list_models(module="sknet")]


@pytest.mark.parametrize("name", NETWORKS)
def test_registered_networks_are_timms(name: str):
    with torch.device("meta"):
        ours, theirs = timm.create_model(f"fused_{name}", num_classes=7), timm.create_model(name, num_classes=7)
    assert len(units_of(ours)) == UNITS[name] and ours.default_cfg == theirs.default_cfg
    assert {key: value.shape for key, value in ours.state_dict().items()} == {key: value.shape for key, value in theirs.state_dict().items()}


def hub(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> list[str]:
    """The hub, which has this state for every name; the names it is asked for."""
    asked: list[str] = []

    def answer(name: str, *_, **__) -> dict[str, Tensor]:
        asked.append(name)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", answer)
    monkeypatch.setattr("timm.models._builder.has_hf_hub", lambda *_, **__: True)
    return asked


@pytest.mark.parametrize("name", ["fused_skresnet18", "fused_skresnet18.ra_in1k"])
def test_pretrained_weights_are_timms(monkeypatch: pytest.MonkeyPatch, name: str):
    theirs = timm.create_model("skresnet18")
    asked = hub(monkeypatch, theirs.state_dict())
    ours = timm.create_model(name, pretrained=True)
    assert asked == ["timm/skresnet18.ra_in1k"]
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    features = timm.create_model(name, pretrained=True, features_only=True, in_chans=1)
    assert len(units_of(features)) == UNITS["skresnet18"]
    assert torch.equal(features.layer1[0].conv1.paths[0].conv.weight, theirs.layer1[0].conv1.paths[0].conv.weight)


def test_weights_from_a_file(tmp_path: Path):
    theirs = timm.create_model("skresnet18")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = timm.create_model("fused_skresnet18", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
