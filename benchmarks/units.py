"""One SK unit: timm's against the fused one, in eval and in a training step (forward and backward), each side in its faster
layout, beside compilers and inference runtimes. The convolutions of the branches alone are what a user may believe to be
the floor, the physical floor is what the device needs to move the compulsory bytes, or to multiply. Also counted, and
exact: bytes kept for the backward, and, beside the convolutions, operators called and passes over a branch."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from . import figures, harness
from .cases import MAIN, UNITS
from .contenders import CONTENDERS, Settings, entries, exact, kept, passes
from .harness import LAYOUTS, MODES, PAIR, Benchmark


# What a ratio is taken to; as CUDA graphs, on a GPU, to what is one.
AGAINST = ("timm", "convolutions", "timm:graph", "convolutions:graph")


def rows(arguments: Namespace) -> Iterator[dict]:
    names = list(UNITS) if arguments.units == ["all"] else arguments.units
    settings = Settings(arguments.device, arguments.precision)
    contenders = {side: CONTENDERS[side].in_layouts(arguments.layouts) for side in arguments.contenders}
    for name in harness.progress(names, "units"):
        case = UNITS[name]
        unit = case.unit().to(arguments.device)
        x, g = case.tensors(arguments.batch, arguments.device)
        row = {"unit": name, "floor": {}, "exact": {}}
        for mode in MODES:
            runs = entries(contenders, unit, x, g, mode, settings)
            reference = exact(unit, x, g, mode, settings)
            row[mode] = harness.race(runs, reference, arguments.seconds, arguments.device, against=AGAINST)
            floor = case.floor(arguments.batch, mode, 2 if arguments.precision == "bfloat16" else 4)
            row["floor"][mode] = {**floor._asdict(), "ms": floor.ms(arguments.ceilings)}
        for side in PAIR:
            row["exact"][side] = {"bytes_kept": kept(CONTENDERS[side], unit, x, settings)}
            for mode in MODES:
                row["exact"][side][mode] = passes(CONTENDERS[side], unit, x, g, mode, settings, case.branch_values(arguments.batch))
        yield row


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of the main sides, and the ratio of sk_fused to timm eager, pair by pair; on a GPU also those of all as CUDA graphs."""
    header = ["unit", "mode", "timm, ms", "best peer, ms", "sk_fused, ms", "convolutions, ms", "floor, ms", "sk_fused ÷ timm (quartiles)", "passes, timm → sk_fused", "MB kept, ÷ timm's"]
    graphs = list(dict.fromkeys(side for row in rows for mode in MODES for side in row[mode] if side.endswith(":graph")))
    cells = [_cells(row, mode) + [f"{row[mode][side]['median_ms']:.2f}" if "median_ms" in row[mode].get(side, {}) else "" for side in graphs] for row in rows for mode in MODES]
    return header + [f"{side}, ms" for side in graphs], cells


def _cells(row: dict, mode: str) -> list[str]:
    sides, cells = row[mode], [row["unit"], MODES[mode]]
    if "median_ms" not in sides["sk_fused"]:
        return [*cells, *[""] * 5, sides["sk_fused"]["error"], "", ""]
    peers = {side: sides[side]["median_ms"] for side in sides if side in _PEERS and "median_ms" in sides[side]}
    best = min(peers, key=peers.get, default=None)
    timm, ours, convolutions = (f"{sides[side]['median_ms']:.2f}" if "median_ms" in sides.get(side, {}) else "" for side in _SHOWN)
    low, median, high = sides["sk_fused"]["ratio"]["timm"]
    cells += [timm, f"{peers[best]:.2f} {best}" if best else "", ours, convolutions, f"{row['floor'][mode]['ms']:.2f}", f"{median:.2f} ({low:.2f}–{high:.2f})"]
    cells.append(" → ".join(f"{row['exact'][side][mode]['passes']:g}" for side in PAIR))
    theirs, kept = (row["exact"][side]["bytes_kept"] for side in PAIR)
    return [*cells, "" if mode == "eval" else f"{kept / 1e6:.1f}, {kept / theirs:.2f}"]


_SHOWN = ("timm", "sk_fused", "convolutions")
_PEERS = [side for side in CONTENDERS if not side.startswith("sk_fused") and side not in _SHOWN]


def figure(result: dict, path: Path) -> None:
    """Speed-up over timm eager, unit by unit: eval above, training step below."""
    rows = result["rows"]
    page, axes = figures.page(2, height=6.6, width=max(7.5, 1.25 * len(rows)))
    # The forced backends are for the report: the chosen one is drawn.
    for each, (mode, title) in zip(axes, MODES.items()):
        sides = [side for side in figures.STYLE if side != "timm" and any(side in row[mode] for row in rows)]
        series = {side: [1 / row[mode][side]["ratio"]["timm"][1] if row[mode].get(side, {}).get("ratio") else None for row in rows] for side in sides}
        figures.bars(each, [figures.wrapped(row["unit"]) for row in rows], series)
        each.axhline(1, color="black", linewidth=0.9, linestyle="--")
        each.set_ylabel(f"{title}: times as fast\nas timm eager", fontsize=8.5)
    figures.finish(page, "Speed of one SK unit (timm eager = 1, higher is better)", harness.source(result), path, axes[0])


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--units", nargs="+", choices=[*UNITS, "all"], default=MAIN, metavar="UNIT", help=f"all, or some of: {'; '.join(UNITS)}")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who takes part (default: all)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of x (default: both)")


BENCHMARK = Benchmark("units", __doc__, rows, table, figure, options, {"units": [MAIN[0], MAIN[4]], "contenders": ["timm", "timm:compile", "sk_fused", "convolutions"], "seconds": 2.0})

if __name__ == "__main__":
    harness.command(BENCHMARK)
