"""The parity rule, for units and operators: the error against float64 is at most twice that of timm (or of plain
PyTorch) in the same dtype, plus a few ulp: benchmarks.harness.within_parity."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from benchmarks import harness
from sk_fused import FusedSelectiveKernel

harness.let_timm_import()

from timm.layers import SelectiveKernel  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# From timm's float32 rounding error to a float64 one, with half as much again: the float64 oracle has an error of its own.
_TO_FLOAT64 = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def precision_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which theirs is run: in float64 the oracle cannot see its own error, so it is measured in float32."""
    return torch.float32 if dtype == torch.float64 else dtype


def assert_within(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, magnitude: Tensor | None = None) -> None:
    """The parity rule for one tensor; theirs is in `precision_of(ours.dtype)`. `magnitude` is what the ulp is measured by,
    if not by the exact values."""
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), name
        return
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, expected {exact.shape}"
    if exact.numel() == 0:
        return
    if ours.dtype == torch.float64:
        theirs = exact + (theirs.double() - exact) * _TO_FLOAT64
    errors = f"{name}: error {harness.error_of(ours, exact):.3g}, theirs {harness.error_of(theirs, exact):.3g}, largest {exact.abs().max():.3g}"
    if magnitude is None:
        assert harness.within_parity(ours, theirs, exact), errors
    else:
        ulp = torch.finfo(ours.dtype).eps * magnitude.abs().max().item()
        assert harness.error_of(ours, exact) <= 2 * harness.error_of(theirs, exact) + 4 * ulp, errors


def pair(dtype: torch.dtype = torch.float32, layout: str = "contiguous", **arguments) -> tuple[nn.Module, nn.Module]:
    """Our unit and timm's, made from the same seed, with statistics and affine parameters that are not the initial ones."""
    units = []
    for unit_class in (FusedSelectiveKernel, SelectiveKernel):
        torch.manual_seed(1)
        unit = unit_class(**arguments)
        for module in unit.modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.3)
                if module.running_mean is not None:
                    nn.init.normal_(module.running_mean, std=0.3)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
        units.append(unit.to(dtype=dtype, memory_format=LAYOUTS[layout]))
    for (name, ours), (_, theirs) in zip(units[0].state_dict().items(), units[1].state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), f"the same seed gives another {name}"
    return units[0], units[1]


def freeze(unit: nn.Module, where: str = "") -> nn.Module:
    """Puts the batch-norms whose name starts with `where` into eval mode."""
    for name, module in unit.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name.startswith(where):
            module.eval()
    return unit


def step(unit: nn.Module, x: Tensor, g: Tensor | None, autocast: AbstractContextManager) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward, g the gradient of the output; None: of the output's sum."""
    torch.manual_seed(2)
    x = x.detach().requires_grad_()
    unit.zero_grad(set_to_none=True)
    with autocast:
        v = unit(x)
    v.sum().backward() if g is None else v.backward(g.to(v.dtype))
    results = {"output": v, "x.grad": x.grad}
    results |= {f"{name}.grad": p.grad for name, p in unit.named_parameters() if p.grad is not None}
    # The next step may write where these lie: buffers, and all that a CUDA graph gives.
    return {name: tensor.detach().clone() for name, tensor in (*results.items(), *unit.named_buffers())}


def assert_parity(
    ours: nn.Module,
    theirs: nn.Module,
    xs: Sequence[Tensor],
    gradient: Callable[[Tensor], Tensor] | None = torch.randn_like,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Trains both on the batches `xs` (buffers go on from step to step) and holds output, input gradient, parameter
    gradients and buffers of all steps to the rule; timm's error is the larger of its two layouts'. `gradient` makes the
    gradient of the output; None: a sum's."""
    dtype, precision = xs[0].dtype, precision_of(xs[0].dtype)
    exact = copy.deepcopy(theirs).double()
    rounded = [copy.deepcopy(theirs).to(precision) for _ in LAYOUTS]
    runs = [(ours, dtype, autocast, None), *((unit, precision, autocast, layout) for unit, layout in zip(rounded, LAYOUTS.values()))]
    runs.append((exact, torch.float64, nullcontext, None))
    steps: list[list[dict[str, Tensor]]] = [[] for _ in runs]
    for x in xs:
        g = gradient(output_like(exact, x)) if gradient else None
        for results, (unit, unit_dtype, context, layout) in zip(steps, runs):
            unit_x = x.to(unit_dtype) if layout is None else x.to(dtype=unit_dtype, memory_format=layout)
            results.append(step(unit, unit_x, None if g is None else g.to(unit_dtype), context()))
    ours_pooled, *theirs_pooled, right = (pooled(results) for results in steps)
    assert_all_within(ours_pooled, worse(*theirs_pooled, right), right)


def pooled(steps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What all the steps gave, one after the other."""
    return {name: torch.cat([result[name].flatten() for result in steps]) for name in steps[0]}


def worse(contiguous: Mapping[str, Tensor], channels_last: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of two runs, tensor by tensor the one with the larger error: an error is one draw of chance, and two are known better."""
    return {name: max(contiguous[name], channels_last[name], key=lambda value: harness.error_of(value, right)) for name, right in exact.items()}


def assert_all_within(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, value in ours.items():
        assert_within(name, value, theirs[name], exact[name])


def output_like(unit: nn.Module, x: Tensor) -> Tensor:
    """Of the shape of the unit's output, in the dtype and layout of x."""
    with torch.no_grad():
        shape = copy.deepcopy(unit).eval()(x.to(next(unit.parameters()).dtype)).shape
    layout = torch.channels_last if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def batches(count: int, shape: Sequence[int], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    """Batches of images that differ in brightness and contrast, as photographs do. (Were they alike, the batch-norm of the
    attention would divide by next to nothing, and blow up every rounding error, ours and timm's.)"""
    per_image = (*shape[:2], 1, 1)
    images = [torch.randn(*shape) * (0.5 + 2 * torch.rand(per_image)) + torch.randn(per_image) for _ in range(count)]
    return [image.to(dtype=dtype, memory_format=LAYOUTS[layout]) for image in images]
