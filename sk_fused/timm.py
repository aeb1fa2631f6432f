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


def _fused(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        model = getattr(sknet, name)(pretrained, **kwargs)
        fuse(model)
        return model

    create.__name__ = f"fused_{name}"
    return create


for _name in sknet.default_cfgs:
    register_model(_fused(_name))
