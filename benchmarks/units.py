"""One SK unit: timm eager against the fused one, in both layouts, eval and training step (forward and backward), and
the branches' convolutions alone, which no fusion after them can beat."""

import argparse
import copy

import torch
from torch import Tensor, nn

from . import harness
from .harness import console

harness.let_timm_import()

from timm.layers import SelectiveKernel  # noqa: E402

import sk_fused  # noqa: E402

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# The SK units of skresnet18 and skresnet34 (split input), and of skresnext50_32x4d (32 groups, whole input).
CASES = {
    "64 ch 56², split": (dict(in_channels=64, rd_ratio=1 / 8, rd_divisor=16), 56),
    "128 ch 28², split": (dict(in_channels=128, rd_ratio=1 / 8, rd_divisor=16), 28),
    "256 ch 14², split": (dict(in_channels=256, rd_ratio=1 / 8, rd_divisor=16), 14),
    "512 ch 7², split": (dict(in_channels=512, rd_ratio=1 / 8, rd_divisor=16), 7),
    "128 ch 56², 32 groups": (dict(in_channels=128, groups=32, split_input=False, rd_divisor=32), 56),
    "256 ch 28², 32 groups": (dict(in_channels=256, groups=32, split_input=False, rd_divisor=32), 28),
    "512 ch 14², 32 groups": (dict(in_channels=512, groups=32, split_input=False, rd_divisor=32), 14),
    "1024 ch 7², 32 groups": (dict(in_channels=1024, groups=32, split_input=False, rd_divisor=32), 7),
}


class Convolutions(nn.Module):
    """The branches' convolutions of a unit and nothing else."""

    def __init__(self, unit: nn.Module):
        super().__init__()
        self.split_input = unit.split_input
        self.convs = nn.ModuleList(path.conv for path in unit.paths)

    def forward(self, x: Tensor) -> list[Tensor]:
        xs = x.split(x.shape[1] // len(self.convs), 1) if self.split_input else [x] * len(self.convs)
        return [conv(x_m) for conv, x_m in zip(self.convs, xs)]


def convolutions_step(module: nn.Module, x: Tensor, g: Tensor):
    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        ys = module(x)
        torch.autograd.backward(ys, [g] * len(ys))

    return run


def parity(theirs: nn.Module, ours: nn.Module, x: Tensor, g: Tensor) -> bool:
    """The parity rule for output, input gradient and every parameter's gradient, training."""
    results = []
    for model, dtype in ((ours, x.dtype), (theirs, x.dtype), (theirs, torch.float64)):
        model = copy.deepcopy(model).to(dtype).train()
        leaf = x.detach().to(dtype).requires_grad_()
        v = model(leaf)
        v.backward(g.to(dtype))
        results.append([v.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    return all(harness.within_parity(*tensors) for tensors in zip(*results))


def measure(name: str, batch: int, seconds: float) -> dict:
    arguments, size = CASES[name]
    torch.manual_seed(0)
    theirs = SelectiveKernel(**arguments)
    ours = copy.deepcopy(theirs)
    sk_fused.fuse(ours)
    C = arguments["in_channels"]
    x, g = torch.randn(batch, C, size, size), torch.randn(batch, C, size, size)
    row = {"unit": name, "parity": parity(theirs, ours, x, g)}
    if not row["parity"]:
        return row
    runs = {"eval": {}, "train": {}}
    for layout, memory_format in LAYOUTS.items():
        laid_out_x, laid_out_g = (t.to(memory_format=memory_format).detach() for t in (x, g))
        for side, model in (("timm", theirs), ("fused", ours), ("convolutions", Convolutions(theirs))):
            evaluated, trained = (copy.deepcopy(model).to(memory_format=memory_format).train(train) for train in (False, True))
            step = convolutions_step if side == "convolutions" else harness.training_step
            runs["eval"][f"{side} {layout}"] = harness.evaluation(evaluated, laid_out_x)
            runs["train"][f"{side} {layout}"] = step(trained, laid_out_x.clone().requires_grad_(), laid_out_g)
    for kind, contenders in runs.items():
        times = harness.interleaved(contenders, seconds)
        best = {side: harness.fastest(times, side) for side in ("timm", "fused", "convolutions")}
        row[kind] = {**best, "ratio": harness.ratio(times, best["fused"], best["timm"])}
        row[kind]["contenders"] = {contender: harness.summary(values) for contender, values in times.items()}
    row["bytes_kept"] = {}
    for side, model in (("timm", theirs), ("fused", ours)):
        training = copy.deepcopy(model).train()
        row["bytes_kept"][side] = harness.bytes_kept(lambda: training(x), training, x)
    row["bytes_kept"]["ratio"] = row["bytes_kept"]["fused"] / row["bytes_kept"]["timm"]
    return row


HEADER = ["unit", "eval ms: timm", "fused", "convolutions", "ratio", "training ms: timm", "fused", "convolutions", "ratio", "bytes kept, ratio"]


def cells(row: dict) -> list[str]:
    """One row of the table: each side in its faster layout, and the ratio of fused to timm."""
    if not row["parity"]:
        return [row["unit"], "parity failed", *[""] * (len(HEADER) - 2)]
    cells = [row["unit"]]
    for kind in ("eval", "train"):
        figures = row[kind]
        cells += [f"{figures['contenders'][figures[side]]['median_ms']:.2f}" for side in ("timm", "fused", "convolutions")]
        cells.append(f"{figures['ratio']:.2f}")
    return [*cells, f"{row['bytes_kept']['ratio']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images in a batch")
    parser.add_argument("--seconds", type=float, default=5, help="time for each of a unit's two interleaved measurements")
    parser.add_argument("--units", nargs="+", choices=list(CASES), default=list(CASES), metavar="UNIT", help=", ".join(CASES))
    arguments = parser.parse_args()
    rows = []
    for i, name in enumerate(arguments.units, 1):
        console.print(f"{i}/{len(arguments.units)} {name}")
        rows.append(measure(name, arguments.batch, arguments.seconds))
    harness.show(f"SK units, float32, batch {arguments.batch}, {harness.device_name()}; ratios to timm eager, lower is better", HEADER, [cells(row) for row in rows])
    path = harness.save("units", rows, batch=arguments.batch, seconds=arguments.seconds, dtype="float32")
    console.print(f"written: {path.relative_to(harness.ROOT.parent)}")
    failed = [row["unit"] for row in rows if not row["parity"]]
    if failed:
        raise SystemExit(f"parity failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
