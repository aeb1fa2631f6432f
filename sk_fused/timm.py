"""timm's SK networks in timm's registry once more, fused. After `import sk_fused.timm`,
`timm.create_model("fused_skresnet34", pretrained=True)` is timm's skresnet34 after `sk_fused.fuse`: with its arguments, pretrained
tags, checkpoints and configuration (`model.default_cfg` is that of "skresnet34")."""

from collections.abc import Callable

from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model, sknet
from torch import nn

from .convert import fuse

# With the hub's names resolved: they are those of timm's networks.
default_cfgs = generate_default_cfgs(
    {f"fused_{name}.{tag}": get_pretrained_cfg(f"{name}.{tag}") for name, default in sknet.default_cfgs.items() for tag in default.tags}
)


def _fused(create: Callable[..., nn.Module], pretrained: bool, arguments: dict) -> nn.Module:
    model = create(pretrained, **arguments)
    fuse(model)
    return model


@register_model
def fused_skresnet18(pretrained: bool = False, **kwargs) -> nn.Module:
    return _fused(sknet.skresnet18, pretrained, kwargs)


@register_model
def fused_skresnet34(pretrained: bool = False, **kwargs) -> nn.Module:
    return _fused(sknet.skresnet34, pretrained, kwargs)


@register_model
def fused_skresnet50(pretrained: bool = False, **kwargs) -> nn.Module:
    return _fused(sknet.skresnet50, pretrained, kwargs)


@register_model
def fused_skresnet50d(pretrained: bool = False, **kwargs) -> nn.Module:
    return _fused(sknet.skresnet50d, pretrained, kwargs)


@register_model
def fused_skresnext50_32x4d(pretrained: bool = False, **kwargs) -> nn.Module:
    return _fused(sknet.skresnext50_32x4d, pretrained, kwargs)
