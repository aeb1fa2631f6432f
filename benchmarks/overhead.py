"""The host's time: a unit on maps so small that the work of Python and of PyTorch's dispatcher is most of it, eager, one
thread, timm beside sk_fused; on a GPU until the call returns."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch

from . import harness
from .cases import Case
from .contenders import CONTENDERS, Settings, entries, exact
from .harness import MODES, PAIR, Benchmark

SIZE = 4
UNITS = {
    "8 ch": dict(in_channels=8),
    "64 ch, split": dict(in_channels=64, rd_ratio=1 / 8, rd_divisor=16),
    "128 ch, 32 groups": dict(in_channels=128, groups=32, split_input=False, rd_divisor=32),
}


def rows(arguments: Namespace) -> Iterator[dict]:
    settings = Settings(arguments.device, arguments.precision)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in harness.progress(list(UNITS), "units"):
        case = Case(UNITS[name], SIZE)
        unit, (x, g) = case.unit().to(arguments.device), case.tensors(arguments.batch, arguments.device)
        row = {"unit": f"{name}, {SIZE}²"}
        for mode in MODES:
            runs = entries({side: CONTENDERS[side] for side in PAIR}, unit, x, g, mode, settings)
            row[mode] = harness.race(runs, exact(unit, x, g, mode, settings), arguments.seconds, arguments.device, of="host")
        yield row
    torch.set_num_threads(threads)


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for row in rows:
        for mode, title in MODES.items():
            times = [f"{1e3 * row[mode][side]['median_ms']:.0f}" if "median_ms" in row[mode][side] else row[mode][side]["error"] for side in PAIR]
            ratio = row[mode]["sk_fused"]["ratio"].get("timm")
            cells.append([row["unit"], title, *times, f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})" if ratio else ""])
    return ["unit", "mode", *(f"{side}, µs" for side in PAIR), "sk_fused ÷ timm (quartiles)"], cells


def options(parser: ArgumentParser) -> None:
    parser.set_defaults(seconds=3.0)


BENCHMARK = Benchmark("overhead", __doc__, rows, table, options=options, quick={"seconds": 0.5})

if __name__ == "__main__":
    harness.command(BENCHMARK)
