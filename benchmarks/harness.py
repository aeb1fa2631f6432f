"""What every benchmark needs: timing, parity, memory, the record of the machine, the table and the results' files."""

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).parent
console = Console(width=None if Console().is_terminal else 140)


def let_timm_import() -> None:
    """torchvision's binary cannot load beside a CPU build of torch; with these two schemas its Python part can, and so timm."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    return f"{model}, {torch.get_num_threads()} threads"


def environment() -> dict:
    """What a figure depends on beside the code: device, versions, commit."""
    import numpy
    import timm

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "device": device_name(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float, min_rounds: int = 5) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round: all take their turn in each round, A B C A B C, after one warm-up
    round, for about `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return times


def summary(times: list[float]) -> dict:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(times)}


def fastest(times: dict[str, list[float]], prefix: str) -> str:
    """The contender of this prefix with the least median."""
    return min((name for name in times if name.startswith(prefix)), key=lambda name: statistics.median(times[name]))


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Ratio of the medians."""
    return statistics.median(times[ours]) / statistics.median(times[theirs])


def error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute error against a float64 result."""
    return (value.double() - exact).abs().max().item()


def within_parity(ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """The parity rule: our error is at most twice theirs, plus a few ulp of the largest value."""
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    return error(ours, exact) <= 2 * error(theirs, exact) + 4 * ulp


def bytes_kept(forward: Callable[[], Tensor], module: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the distinct storages that a forward keeps for its backward, beside the parameters, buffers and inputs."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), *inputs)}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def training_step(module: nn.Module, x: Tensor, g: Tensor) -> Callable[[], None]:
    """Forward and backward, from fresh gradients, with g the gradient of the output."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(g)

    return run


def evaluation(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return run


def results_folder() -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    folder = ROOT / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(name: str, rows: list[dict], **settings) -> Path:
    """Writes the figures as <name>.json into the folder of this device."""
    path = results_folder() / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "settings": settings, "rows": rows}, indent=1) + "\n")
    return path


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def bar_chart(path: Path, title: str, groups: list[str], series: dict[str, list[float]], unit: str) -> None:
    """Bars side by side for every group, each with its value; lower is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.6 + 2.3 * len(groups), 4.2), layout="constrained")
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        at = [j + (i - (len(series) - 1) / 2) * width for j in range(len(groups))]
        bars = axes.bar(at, values, width * 0.92, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.15 * max(1, *(value for values in series.values() for value in values)))
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
