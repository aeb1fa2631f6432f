"""Memory of a training step: the bytes that a forward keeps for its backward beside the input and the weights (exact),
unit by unit and network by network; and of the networks the peak of a whole step above what was there before it, and the
largest batch whose step fits a budget, each measured in a process of its own, on Linux or a GPU."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from . import figures, harness, models
from .cases import MAIN, NETWORKS, UNITS
from .contenders import CONTENDERS, Settings, kept, step
from .harness import PAIR, Benchmark

import timm  # noqa: E402


def peak(name: str, side: str, batch: int, device: str, precision: str) -> int:
    """Bytes of one training step of a network above what was there before it, at their highest. For a process of its own."""
    settings = Settings(torch.device(device), precision, network=True)
    x = torch.randn(batch, 3, 224, 224, device=device)
    run = step(CONTENDERS[side], timm.create_model(name).to(device), x, torch.ones(batch, 1000, device=device), "train", settings).run
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """This process's memory now (VmRSS) or at its highest (VmHWM), as Linux counts it, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def largest_batch(peaks: dict[int, int], measure, budget: int) -> tuple[int, int]:
    """The largest batch that fits, and its peak: from the line through the two peaks, then lowered until a measured one fits."""
    (few, least), (more, most) = sorted(peaks.items())
    batch = max(1, int(few + (budget - least) * (more - few) / (most - least)))
    while (used := measure(batch)) > budget and batch > 1:
        batch = max(1, min(batch - 1, int(batch * budget / used)))
    return batch, used


def rows(arguments: Namespace) -> Iterator[dict]:
    settings = Settings(arguments.device, arguments.precision)
    for name in harness.progress(arguments.units, "units"):
        case = UNITS[name]
        unit, (x, _) = case.unit().to(arguments.device), case.tensors(arguments.batch, arguments.device)
        branch = case.branch_values(arguments.batch) * (2 if arguments.precision == "bfloat16" else 4)
        yield {"what": name, "branch": branch, "kept": _kept(unit, x, settings)}
    for name in harness.progress(arguments.models, "networks"):
        row = {"what": name, "kept": _kept(models.build(name).to(arguments.device), models.photographs(arguments.batch).to(arguments.device), settings)}
        row |= {"peak": {}, "largest_batch": {}, "budget": int(arguments.budget * 2**30)}
        for side in PAIR:

            def measure(batch: int) -> int:
                return harness.in_new_process("benchmarks.memory:peak", name, side, batch, str(arguments.device), arguments.precision)

            peaks = {batch: measure(batch) for batch in (arguments.batch, 2 * arguments.batch)}
            row["peak"][side] = peaks[arguments.batch]
            row["largest_batch"][side] = largest_batch(peaks, measure, row["budget"])
        yield row


def _kept(module: nn.Module, x: torch.Tensor, settings: Settings) -> dict[str, int]:
    return {side: kept(CONTENDERS[side], module, x, settings) for side in PAIR}


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Bytes kept, in branches where it is a unit; peak; largest batch."""
    budget = next((f"{row['budget'] / 2**30:g} GiB" for row in rows if "budget" in row), "")
    header = ["", "MB kept: timm", "sk_fused", "ratio", "in branches: timm", "sk_fused", "peak MB of a step: timm", "sk_fused", f"largest batch in {budget}: timm", "sk_fused"]
    cells = []
    for row in rows:
        cells.append([row["what"], *(f"{row['kept'][side] / 1e6:.1f}" for side in PAIR), f"{row['kept']['sk_fused'] / row['kept']['timm']:.3f}"])
        cells[-1] += [f"{row['kept'][side] / row['branch']:.2f}" for side in PAIR] if "branch" in row else ["", ""]
        cells[-1] += [*(f"{row['peak'][side] / 1e6:.0f}" for side in PAIR), *(str(row["largest_batch"][side][0]) for side in PAIR)] if "peak" in row else [""] * 4
    return header, cells


def figure(result: dict, path: Path) -> None:
    """Bytes kept by the units, in branches; and of the networks bytes kept and peak."""
    units, networks = ([row for row in result["rows"] if ("branch" in row) == unit] for unit in (True, False))
    page, axes = figures.page(1, 3, height=4.4, width=13, width_ratios=(2.4, 1, 1))
    figures.bars(axes[0], [figures.wrapped(row["what"]) for row in units], {side: [row["kept"][side] / row["branch"] for row in units] for side in PAIR}, "%.1f")
    axes[0].axhline(2, color="black", linewidth=0.9, linestyle="--")
    axes[0].set_title("units: kept for the backward, in branches\n(the maths needs 2)", fontsize=9)
    for each, figure, title in ((axes[1], "kept", "networks: kept for the backward, MB"), (axes[2], "peak", "networks: peak of a training step, MB")):
        figures.bars(each, [row["what"].replace("_", "\n") for row in networks], {side: [row[figure][side] / 1e6 for row in networks] for side in PAIR}, "%.0f")
        each.set_title(title, fontsize=9)
    figures.finish(page, "Memory in training (lower is better)", harness.source(result), path, axes[0])


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--units", nargs="+", choices=UNITS, default=MAIN, metavar="UNIT", help="some of the units that units.py knows")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(models.MAIN), help="timm's names")
    parser.add_argument("--budget", type=float, default=4.0, help="GiB that the largest batch may take (default: %(default)s)")


BENCHMARK = Benchmark("memory", __doc__, rows, table, figure, options, {"models": ["skresnet18"], "budget": 1.0})

if __name__ == "__main__":
    harness.command(BENCHMARK)
