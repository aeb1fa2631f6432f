"""The SK units that are measured: every distinct one of timm's five SK networks at 224², and the sweeps."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import harness

harness.let_timm_import()

from timm.layers import SelectiveKernel  # noqa: E402

# The networks, each with its plain ResNet twin: the same without SK units.
NETWORKS = {
    "skresnet18": "resnet18",
    "skresnet34": "resnet34",
    "skresnet50": "resnet50",
    "skresnet50d": "resnet50d",
    "skresnext50_32x4d": "resnext50_32x4d",
}

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SIZES = (7, 14, 28, 56, 112)


class Floor(NamedTuple):
    """The least that a unit must move and compute: compulsory bytes, flops of its convolutions."""

    bytes: int
    flops: int

    def ms(self, ceilings: dict[str, float]) -> float:
        """At the speed that the device was measured to copy and to multiply at."""
        return max(self.bytes / ceilings["copy_GBps"], self.flops / ceilings["matrix_GFLOPs"]) / 1e6


class Case(NamedTuple):
    """A unit, by timm's arguments, on maps of `size`² (before its stride)."""

    arguments: dict
    size: int

    def unit(self) -> SelectiveKernel:
        """timm's, with seeded weights."""
        torch.manual_seed(0)
        return SelectiveKernel(**self.arguments)

    @property
    def channels(self) -> tuple[int, int]:
        """Of the input and of the output."""
        return self.arguments["in_channels"], self.arguments.get("out_channels", self.arguments["in_channels"])

    @property
    def out_size(self) -> int:
        return -(-self.size // self.arguments.get("stride", 1))

    def tensors(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """x and the gradient of the output. The images of x differ in brightness and contrast, as photographs do; were they
        alike, the batch-norm of the attention would blow up every rounding error."""
        generator = torch.Generator().manual_seed(1)
        shapes = zip(self.channels, (self.size, self.out_size))
        x, g = (torch.randn(batch, C, size, size, generator=generator) for C, size in shapes)
        contrast = torch.rand(batch, self.channels[0], 1, 1, generator=generator)
        brightness = torch.randn(batch, self.channels[0], 1, 1, generator=generator)
        return (x * (0.5 + 2 * contrast) + brightness).to(device), g.to(device)

    def branch_values(self, batch: int) -> int:
        """Values of one branch."""
        return batch * self.channels[1] * self.out_size**2

    def floor(self, batch: int, mode: str, itemsize: int = 4) -> Floor:
        """Eval reads x once and writes the output once. A training step also writes and reads back the two branches, which
        its backward needs, reads g and x again and writes dx; its convolutions are computed three times over."""
        C_in, C = self.channels
        branch, x = self.branch_values(batch), batch * C_in * self.size**2
        fan_in = 9 * (C_in // 2 if self.arguments.get("split_input", True) else C_in) // self.arguments.get("groups", 1)
        flops, weights = 2 * 2 * branch * fan_in, 2 * C * fan_in
        if mode == "eval":
            return Floor(itemsize * (x + branch + weights), flops)
        return Floor(itemsize * (3 * x + 2 * branch + 2 * 2 * branch + 3 * weights), 3 * flops)


def _family(title: str, first: int, arguments: dict, widens: bool) -> dict[str, Case]:
    """The units of a network's four stages, at stride 1 and at the stride 2 that leads to the next stage."""
    cases = {}
    for stage in range(4):
        C, size = first << stage, 56 >> stage
        if stage:
            C_in = C // 2 if widens else C
            name = f"{C_in}→{C}" if widens else f"{C}"
            cases[f"{name} ch {2 * size}², stride 2, {title}"] = Case(dict(in_channels=C_in, out_channels=C, stride=2, **arguments), 2 * size)
        cases[f"{C} ch {size}², {title}"] = Case(dict(in_channels=C, **arguments), size)
    return cases


UNITS = {
    # skresnet18 and skresnet34
    **_family("split", 64, dict(rd_ratio=1 / 8, rd_divisor=16, split_input=True), widens=True),
    # skresnext50_32x4d
    **_family("32 groups", 128, dict(rd_ratio=1 / 16, rd_divisor=32, groups=32, split_input=False), widens=False),
    # skresnet50 and skresnet50d
    **_family("split, narrow attention", 64, dict(rd_ratio=1 / 16, rd_divisor=8, split_input=True), widens=False),
}

# One of each kind and stage: what the tables and figures show unless all are asked for.
MAIN = [name for name in UNITS if "stride" not in name and "narrow" not in name]
