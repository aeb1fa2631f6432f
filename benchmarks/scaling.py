"""Scaling of one SK unit: time against the batch (1 to 1024) and against the map's size, timm eager beside sk_fused, each in
its faster layout, with the fitted slope: the power of the batch, or of the number of pixels, that the time grows with; 1
is proportional, less means that a fixed cost still weighs."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

from . import figures, harness
from .cases import BATCHES, SIZES, UNITS, Case
from .contenders import CONTENDERS, Settings, away_from_kinks, entries, exact
from .harness import MODES, PAIR, Benchmark

# What is swept, and what the time is expected to be proportional to.
SWEEPS = {"batch": ("256 ch 14², split", lambda value: value), "size": ("64 ch 56², split", lambda value: value**2)}


def rows(arguments: Namespace) -> Iterator[dict]:
    settings = Settings(arguments.device, arguments.precision)
    points = [("batch", batch) for batch in arguments.batches] + [("size", size) for size in arguments.sizes]
    for sweep, value in harness.progress(points, "points"):
        case = UNITS[SWEEPS[sweep][0]]
        batch = value if sweep == "batch" else arguments.batch
        case = Case(case.arguments, value) if sweep == "size" else case
        unit, (x, g) = case.unit().to(arguments.device), case.tensors(batch, arguments.device)
        row = {"sweep": sweep, "unit": SWEEPS[sweep][0], "value": value}
        for mode in MODES:
            if mode == "train" and batch < 4:
                # Of one image the attention's batch-norm has no variance, and of two it knows only signs: no parity to check.
                continue
            if mode == "train":
                unit, g = away_from_kinks(unit, x, g)
            runs = entries({side: CONTENDERS[side] for side in PAIR}, unit, x, g, mode, settings)
            row[mode] = harness.race(runs, exact(unit, x, g, mode, settings), arguments.seconds, arguments.device)
        yield row


def slope(sweep: str, values: Sequence[int], times: Sequence[float]) -> float | None:
    """The exponent: least squares through the logarithms."""
    if len(values) < 2:
        return None
    return float(numpy.polyfit(numpy.log([SWEEPS[sweep][1](value) for value in values]), numpy.log(times), 1)[0])


def _points(rows: list[dict], sweep: str, mode: str, side: str) -> tuple[list[int], list[float]]:
    timed = [(row["value"], row[mode][side]["median_ms"]) for row in rows if row["sweep"] == sweep and "median_ms" in row.get(mode, {}).get(side, {})]
    return [value for value, _ in timed], [ms for _, ms in timed]


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """One line for each sweep, mode and side: the times and the slope."""
    cells = []
    for sweep in dict.fromkeys(row["sweep"] for row in rows):
        for mode, title in MODES.items():
            for side in PAIR:
                values, times = _points(rows, sweep, mode, side)
                exponent = slope(sweep, values, times)
                shown = "; ".join(f"{value}: {ms:.3g}" for value, ms in zip(values, times))
                cells.append([sweep, SWEEPS[sweep][0].replace(" 56²", "") if sweep == "size" else SWEEPS[sweep][0], title, side, shown])
                cells[-1].append("" if exponent is None else f"{exponent:.2f}")
    return ["sweep", "unit", "mode", "side", "ms at each value", "slope"], cells


def figure(result: dict, path: Path) -> None:
    """Both sweeps, both axes logarithmic."""
    page, axes = figures.page(1, 2, height=4.6)
    for each, sweep in zip(axes, SWEEPS):
        for (mode, title), line in zip(MODES.items(), figures.LINES):
            for side, marker in zip(PAIR, figures.MARKERS):
                values, times = _points(result["rows"], sweep, mode, side)
                exponent = slope(sweep, values, times)
                label = f"{side}, {title}" + ("" if exponent is None else f": slope {exponent:.2f}")
                color = figures.STYLE[side][0]
                filled = color if mode == "eval" else "white"
                each.loglog(values, times, line, marker=marker, markersize=5, markerfacecolor=filled, color=color, label=label)
        each.set_xlabel({"batch": "images in a batch", "size": f"height and width of the map, pixels (batch {result['settings']['batch']})"}[sweep], fontsize=8.5)
        each.set_ylabel("ms", fontsize=8.5)
        ticks = sorted({row["value"] for row in result["rows"] if row["sweep"] == sweep})
        each.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7.5)
        each.minorticks_off()
        each.set_title(f"{SWEEPS[sweep][0].split(',')[0] if sweep == 'batch' else '64 ch'}, split", fontsize=9)
        each.grid(which="major", color="#e5e5e5", linewidth=0.6)
        each.legend(frameon=False, fontsize=8, ncols=2, handlelength=3.5, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    figures.finish(page, "Time of one SK unit against batch and size (lower is better)", harness.source(result), path)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="swept with the map of the unit")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="swept with --batch")
    parser.set_defaults(seconds=2.0)


BENCHMARK = Benchmark("scaling", __doc__, rows, table, figure, options, {"batches": [1, 8, 64], "sizes": [7, 28], "seconds": 0.5})

if __name__ == "__main__":
    harness.command(BENCHMARK)
