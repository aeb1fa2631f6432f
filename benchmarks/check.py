"""The regression guard: the main units' time as a ratio to their convolutions alone, measured beside it, in several runs, each
a process of its own, from which the noise is learnt; and what is exact: bytes kept, operators called, passes over a branch,
instructions of the CPU kernels.

In full it learns and writes check.json. With --quick it runs once and compares with the committed check.json of
this kind of device: it fails where a ratio left the band (twice as far from the median as the farthest run learnt), or
where something exact has changed."""

import json
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import harness, instructions, units
from .cases import MAIN
from .harness import MODES, Benchmark, console


def once(arguments: list[str]) -> list[dict]:
    """The rows of one run of `units`. For a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        console.quiet = True
        path = harness.command(units.BENCHMARK, [*arguments, "--results", folder])
        return json.loads(path.read_text())["rows"]


def rows(arguments: Namespace) -> Iterator[dict]:
    options = ["--quick", "--units", *arguments.units, "--contenders", "timm", "sk_fused", "convolutions"]
    options += ["--seconds", str(arguments.seconds), "--batch", str(arguments.batch), "--device", str(arguments.device), "--precision", arguments.precision]
    runs = [harness.in_new_process("benchmarks.check:once", options) for _ in harness.progress(range(arguments.runs), "runs")]
    for i, row in enumerate(runs[0]):
        for mode in MODES:
            ratios = [run[i][mode]["sk_fused"]["ratio"]["convolutions"][1] for run in runs]
            yield {"what": f"{row['unit']}, {MODES[mode]}", "ratios": ratios}
        exact = row["exact"]["sk_fused"]
        yield {"what": f"{row['unit']}, bytes kept", "exact": exact["bytes_kept"]}
        for mode in MODES:
            yield from ({"what": f"{row['unit']}, {MODES[mode]}, {name}", "exact": number} for name, number in exact[mode].items())
    try:
        counts = instructions.count() if arguments.device.type == "cpu" else {}
    except RuntimeError as error:
        yield {"what": "instructions", "error": str(error)}
    else:
        yield from ({"what": f"instructions, {name}", "exact": number} for name, number in counts.items())


def band(ratios: Sequence[float]) -> tuple[float, float]:
    """What the noise allows: twice as far from the median as the farthest run learnt."""
    median = statistics.median(ratios)
    return median - 2 * (median - min(ratios)), median + 2 * (max(ratios) - median)


def compare(learnt: list[dict], now: list[dict]) -> tuple[list[str], list[str]]:
    """What got worse (slower, or another number where it is exact), and what else is worth saying."""
    known, worse, notes = {row["what"]: row for row in learnt}, [], []
    for row in now:
        before = known.get(row["what"], {})
        if "ratios" in row and "ratios" in before:
            ratio, (low, high) = statistics.median(row["ratios"]), band(before["ratios"])
            if not low <= ratio <= high:
                text = f"{row['what']}: {ratio:.3f} times its convolutions, was {statistics.median(before['ratios']):.3f} (noise {low:.3f} to {high:.3f})"
                (worse if ratio > high else notes).append(f"{'slower' if ratio > high else 'faster'}: {text}")
        elif "exact" in row and "exact" in before:
            if row["exact"] != before["exact"]:
                more = row["exact"] > before["exact"]
                (worse if more else notes).append(f"{'more' if more else 'less'}: {row['what']}: {row['exact']}, was {before['exact']}")
        else:
            notes.append(f"not compared: {row['what']}: {row.get('error') or before.get('error') or 'not in the committed results'}")
    return worse, notes


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for row in rows:
        if "ratios" in row:
            low, high = band(row["ratios"])
            cells.append([row["what"], f"{statistics.median(row['ratios']):.3f} × convolutions", f"{low:.3f}–{high:.3f} ({len(row['ratios'])} runs)"])
        else:
            cells.append([row["what"], f"{row['exact']:,}" if "exact" in row else row["error"], "exact" if "exact" in row else ""])
    return ["what", "value", "band"], cells


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--units", nargs="+", choices=MAIN, default=[MAIN[0], MAIN[4]], metavar="UNIT", help="guarded units (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=9, help="processes (default: %(default)s)")
    parser.set_defaults(seconds=2.0)


BENCHMARK = Benchmark("check", __doc__, rows, table, options=options, quick={"runs": 1})


def main() -> None:
    path = harness.command(BENCHMARK)
    if not path.stem.endswith("-quick"):
        return
    committed = harness.ROOT / "results" / path.parent.name / f"{path.stem.removesuffix('-quick')}.json"
    if not committed.exists():
        raise SystemExit(f"nothing to compare with: no {committed.relative_to(harness.REPOSITORY)}; `python -m benchmarks.check` learns it")
    worse, notes = compare(*(json.loads(each.read_text())["rows"] for each in (committed, path)))
    for line in (*notes, *worse):
        console.print(line)
    if worse:
        raise SystemExit(f"{len(worse)} worse than {committed.relative_to(harness.REPOSITORY)}")
    console.print("nothing got worse")


if __name__ == "__main__":
    main()
