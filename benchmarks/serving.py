"""Serving a network: eval, as one would deploy it on a CPU. timm's SK networks compiled, compiled with their parameters frozen,
in ONNX Runtime and in OpenVINO, beside the fused ones compiled and frozen, and the frozen plain ResNet twin, for the SK tax.
All take turns in one run, each with as many threads; parity of the logits is checked first."""

from argparse import ArgumentParser
from pathlib import Path

from . import figures, harness
from .cases import NETWORKS
from .harness import LAYOUTS, Benchmark
from .models import QUICK, milliseconds, rows

PEERS = ("timm:compile", "timm:freezing", "onnxruntime", "openvino")
OURS = ("sk_fused:compile", "sk_fused:freezing")
TWIN = "plain:freezing"


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of all, and the frozen fused network beside the fastest of the others, and beside its twin."""
    header = ["model", *(f"{side}, ms" for side in (*PEERS, *OURS)), "sk_fused:freezing ÷ fastest other (quartiles)", "SK tax, frozen: timm → sk_fused"]
    return header, [_cells(row["model"], row["eval"]) for row in rows]


def _cells(model: str, sides: dict[str, dict]) -> list[str]:
    ratios = sides["sk_fused:freezing"].get("ratio", {})
    other = min((side for side in PEERS if side in ratios), key=lambda side: sides[side]["median_ms"], default=None)
    low, median, high = ratios.get(other, [float("nan")] * 3)
    taxes = (sides[side]["ratio"][TWIN][1] if TWIN in sides[side].get("ratio", {}) else float("nan") for side in ("timm:freezing", "sk_fused:freezing"))
    cells = [model, *(milliseconds(sides.get(side, {})) for side in (*PEERS, *OURS))]
    return [*cells, f"{median:.2f} ({low:.2f}–{high:.2f}), {other}", " → ".join(f"{tax:.2f}" for tax in taxes)]


def figure(result: dict, path: Path) -> None:
    """Images per second, network by network."""
    rows, batch = result["rows"], result["settings"]["batch"]
    page, (axes,) = figures.page(height=3.8, width=max(7.5, 2.2 * len(rows)))
    sides = [side for side in (*PEERS, *OURS) if any("median_ms" in row["eval"].get(side, {}) for row in rows)]
    figures.bars(
        axes,
        [row["model"] for row in rows],
        {side: [1e3 * batch / row["eval"][side]["median_ms"] if "median_ms" in row["eval"][side] else None for row in rows] for side in sides},
        "%.0f",
    )
    axes.set_ylabel("images per second", fontsize=8.5)
    figures.finish(page, "Serving a network: images per second (higher is better)", harness.source(result), path, axes)


def options(parser: ArgumentParser) -> None:
    sides = "timm", *PEERS, *OURS, TWIN
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="timm's names")
    parser.add_argument("--contenders", nargs="+", choices=sides, default=list(sides), help="who takes part (default: all); timm eager is what parity is checked beside")
    parser.set_defaults(seconds=20.0, modes=["eval"], layouts=list(LAYOUTS))


BENCHMARK = Benchmark("serving", __doc__, rows, table, figure, options, QUICK)

if __name__ == "__main__":
    harness.command(BENCHMARK)
