"""fuse() and unfuse(): timm's units into ours and back, in place."""

import sys
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from . import modules
from .families import FAMILIES, Family, adopt, give_back, why_not_known
from .modules import FusedSelectiveKernel, FusedSelectiveKernelAttn


class Unit(NamedTuple):
    """One SK unit of a model: its name in `named_modules` ("" is the model itself), whether it is fused now, at least its
    attention, and what of it is not fused, and why."""

    name: str
    fused: bool
    reason: str | None


@dataclass(frozen=True)
class Report:
    """What `fuse` or `unfuse` found; `str()` is a table."""

    units: tuple[Unit, ...]

    def __str__(self) -> str:
        if not self.units:
            return "no SelectiveKernel found"
        width = max(len(unit.name) for unit in self.units)
        states = ("not fused" if not unit.fused else "attention only" if unit.reason else "fused" for unit in self.units)
        rows = (f"{unit.name:{width}}  {state}  {unit.reason or ''}".rstrip() for unit, state in zip(self.units, states))
        return "\n".join(rows)


def fuse(model: nn.Module) -> Report:
    """Makes every timm SelectiveKernel and SelectiveKernelAttn in `model`, and `model` itself if it is one, the fused one; and the
    units of other projects that `families` knows.

    In place: a unit changes its class and nothing else, so parameters, buffers, hooks, state_dict and an optimizer made
    before go on as they were. A unit whose attention is not timm's own, or a subclass, is left alone; so is what has the name of
    another project's unit, but other layers, or hooks on them, or gives something else of them.
    """
    return _convert(model, _timm_to_fused(), FAMILIES)


def unfuse(model: nn.Module) -> Report:
    """The way back: every fused unit in `model` becomes timm's, or its project's, again. What is timm's needs timm.

    Raises:
        ImportError: there is something to unfuse, and timm is not installed.
    """
    if any(type(module) in (FusedSelectiveKernel, FusedSelectiveKernelAttn) for module in model.modules()):
        from timm.layers import BatchNormAct2d, ConvNormAct
        from timm.layers.norm_act import SyncBatchNormAct

        timm_classes = {modules.BatchNormAct2d: BatchNormAct2d, modules.ConvNormAct: ConvNormAct, nn.SyncBatchNorm: SyncBatchNormAct}
        for unit in [module for module in model.modules() if type(module) is FusedSelectiveKernel]:
            # The branches, where timm had not made them; or torch's converter, which leaves an activation inside that only a fused
            # unit finds there.
            for module in unit.paths.modules():
                # The activation of a branch whose norm was frozen is known to our class alone.
                if type(module) in timm_classes and not (type(module) is modules.ConvNormAct and "act" not in module.bn._modules):
                    module.__class__ = timm_classes[type(module)]
    return _convert(model, {fused: timm for timm, fused in _timm_to_fused().items()}, {})


def _timm_to_fused() -> dict[type[nn.Module], type[nn.Module]]:
    # A model that holds a timm unit has imported timm.
    timm = sys.modules.get("timm.layers.selective_kernel")
    return {timm.SelectiveKernel: FusedSelectiveKernel, timm.SelectiveKernelAttn: FusedSelectiveKernelAttn} if timm else {}


def _convert(model: nn.Module, new_class: dict[type[nn.Module], type[nn.Module]], families: dict[str, type[Family]]) -> Report:
    """With no `families`, those of other projects are given back."""
    fused = FusedSelectiveKernel, FusedSelectiveKernelAttn
    known = (*new_class, *new_class.values(), *fused)
    inside = {id(module.attn) for module in model.modules() if hasattr(module, "attn") and hasattr(module, "paths") and isinstance(module, known)}
    units = []
    for name, module in model.named_modules():
        family = families.get(type(module).__name__)
        if isinstance(module, Family):
            if not families:
                give_back(module)
            units.append((name, module, None))
            continue
        if not isinstance(module, known):
            if family:
                reason = why_not_known(module, family)
                units.append((name, module, reason and f"not the {type(module).__name__} that is known: {reason}"))
                if reason is None:
                    adopt(module, family)
            continue
        reason = None
        if type(module) not in known:
            reason = f"{type(module).__name__} is a subclass of {next(cls.__name__ for cls in known if isinstance(module, cls))}"
        elif new_class.get(type(module)) is FusedSelectiveKernel and type(module.attn) not in known:
            reason = f"attn is a {type(module.attn).__name__}"
        elif type(module) in new_class:
            module.__class__ = new_class[type(module)]
        if id(module) in inside:
            continue
        units.append((name, module, reason))
    fused = *fused, *FAMILIES.values()
    for name, module, _ in units:
        for part in (module, getattr(module, "attn", None)):
            if isinstance(part, fused):
                part.name_in_model = name
            elif part is not None:
                part.__dict__.pop("name_in_model", None)
    return Report(tuple(_unit(name, module, reason) for name, module, reason in units))


def _unit(name: str, module: nn.Module, reason: str | None) -> Unit:
    if isinstance(module, FusedSelectiveKernel) and type(module).forward is FusedSelectiveKernel.forward:
        # FSDP's, too, is a subclass.
        return Unit(name, module._why_not_attn() is None, module.why_not())
    if isinstance(module, (FusedSelectiveKernelAttn, Family)):
        reason = reason or module.why_not()
        return Unit(name, reason is None, reason)
    return Unit(name, False, reason)
