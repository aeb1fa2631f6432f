"""The cold start: seconds from a fresh Python to the second call of a unit (64 channels, 56², batch 8, eval): importing
torch, importing timm or sk_fused beside it, making the unit, its first call, its second; eager, and through torch.compile
with its cache on disk cold and warm. Every round is a process of its own, all contenders in turn; medians with quartiles."""

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from . import harness
from .harness import PAIR, Benchmark

# Whether torch.compile is used, and whether it finds what the run before it left on disk.
KINDS = ("eager", "compile, cache cold", "compile, cache warm")


def rows(arguments: Namespace) -> Iterator[dict]:
    measured: dict[tuple[str, str], list[dict[str, float]]] = {(side, kind): [] for side in PAIR for kind in arguments.kinds}
    for _ in harness.progress(range(arguments.rounds), "rounds"):
        for side in PAIR:
            with tempfile.TemporaryDirectory() as cache:
                # The last two are Triton's, and what was measured to be the faster road.
                environment = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SK_FUSED_CACHE"), cache)
                for kind in arguments.kinds:
                    process = "benchmarks.stages:stages", side, kind != "eager", arguments.device.type
                    measured[side, kind].append(harness.in_new_process(*process, environment=environment))
    for (side, kind), runs in measured.items():
        yield {"side": side, "kind": kind, "seconds": {stage: harness.quartiles([run[stage] for run in runs]) for stage in runs[0]}}


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    header = ["side", "kind", "import torch, s", "import the package, s", "make, s", "first call, s", "second call, s"]
    cells = []
    for row in rows:
        shown = (f"{median:.3g} ({low:.3g}–{high:.3g})" for low, median, high in row["seconds"].values())
        cells.append([row["side"], row["kind"], *shown])
    return header, cells


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="of %(choices)s (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind (default: %(default)s)")


BENCHMARK = Benchmark("cold_start", __doc__, rows, table, options=options, quick={"rounds": 1})

if __name__ == "__main__":
    harness.command(BENCHMARK)
