"""`make report`: every committed result's figure and one Markdown report per device, made from the JSON, and the tables of
the README, between the marks that name a benchmark and a device's folder."""

import json
import re
from pathlib import Path

from . import check, cold_start, digits, harness, memory, models, overhead, parity, passes, scaling, serving, units
from .harness import REPOSITORY, ROOT, Benchmark

README = REPOSITORY / "README.md"
BENCHMARKS: tuple[Benchmark, ...] = (
    models.BENCHMARK,
    models.TAX,
    *(script.BENCHMARK for script in (serving, parity, digits, units, passes, memory, scaling, overhead, cold_start, check)),
)


def results(benchmark: Benchmark, folder: Path) -> list[Path]:
    """The benchmark's results of a device: the usual one, then those of other batches and precisions; quick runs are not reported."""
    return sorted((path for path in folder.glob("*.json") if _is_result(path, benchmark)), key=lambda path: path.stem)


def _is_result(path: Path, benchmark: Benchmark) -> bool:
    return re.fullmatch(rf"{benchmark.name}(-batch-\d+)?(-({'|'.join(harness.PRECISIONS)}))?", path.stem) is not None


def markdown(benchmark: Benchmark, path: Path, beside: Path) -> str:
    """One result, for a Markdown file in the folder `beside`: what it was measured on, the table, the figure."""
    result = json.loads(path.read_text())
    header, cells = benchmark.table(result["rows"])
    lines = [f"{harness.source(result)}; [{path.name}]({_link(path, beside)})", ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
    if path.with_suffix(".png").exists():
        lines += ["", f"![{benchmark.title}]({_link(path.with_suffix('.png'), beside)})"]
    return "\n".join(lines)


def _link(path: Path, beside: Path) -> str:
    return path.relative_to(beside).as_posix()


def could_not(rows: object, name: str = "") -> dict[str, str]:
    """The sides of these rows that could not run, or were not timed, with the first reason."""
    found: dict[str, str] = {}
    for key, value in rows.items() if isinstance(rows, dict) else enumerate(rows) if isinstance(rows, list) else ():
        if key == "layouts":
            continue
        if isinstance(value, dict) and isinstance(value.get("error"), str):
            found.setdefault(str(key), value["error"])
        found = could_not(value, str(key)) | found
    return found


def device_report(folder: Path) -> str:
    """All results of one device."""
    sections = []
    for benchmark in BENCHMARKS:
        for path in results(benchmark, folder):
            title = benchmark.title + path.stem.removeprefix(benchmark.name).replace("-batch-", ", batch ").replace("-", ", ")
            what = benchmark.doc.strip().split(": ", 1)[1]
            sections.append(f"## {title}\n\n{what[0].upper()}{what[1:]}\n\n{markdown(benchmark, path, folder)}")
            ceilings = json.loads(path.read_text())["ceilings"]
            sections.append(f"Measured beside it: copy {ceilings['copy_GBps']:.1f} GB/s, matrix units {ceilings['matrix_GFLOPs']:.0f} GFLOP/s.")
            if stale(path):
                sections.append(f"Measured before changes to {', '.join(stale(path))}.")
            errors = could_not(json.loads(path.read_text())["rows"])
            if errors:
                sections.append("Not timed:\n\n" + "\n".join(f"- {side}: `{error}`" for side, error in errors.items()))
    return "\n\n".join([f"# Results: {folder.name}", "Written by `make report` from the JSON beside it.", *sections]) + "\n"


def readme(text: str) -> str:
    """The README's text with its tables brought up to the results."""

    def table(match: re.Match) -> str:
        path = ROOT / "results" / match["device"] / f"{match['name']}.json"
        benchmark = next(benchmark for benchmark in BENCHMARKS if _is_result(path, benchmark))
        text = markdown(benchmark, path, REPOSITORY) if path.exists() else "Not measured yet."
        return f"{match['mark']}\n{text}\n{match['end']}"

    return re.sub(r"(?P<mark><!-- (?P<name>[\w-]+) (?P<device>[\w-]+) -->)\n.*?(?P<end><!-- end -->)", table, text, flags=re.DOTALL)


def stale(path: Path) -> list[str]:
    """The kernels' sources whose code is no longer what this result was measured with."""
    environment = json.loads(path.read_text())["environment"]
    then, now = environment["kernels"], harness.kernels(environment["device_type"])
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def main() -> None:
    for folder in sorted(path for path in (ROOT / "results").glob("*") if path.is_dir()):
        for benchmark in BENCHMARKS:
            for path in results(benchmark, folder):
                if stale(path):
                    harness.console.print(f"{path.relative_to(REPOSITORY)} is older than {', '.join(stale(path))}", style="red")
                if benchmark.figure:
                    benchmark.figure(json.loads(path.read_text()), path.with_suffix(".png"))
        (folder / "README.md").write_text(device_report(folder))
    README.write_text(readme(README.read_text()))


if __name__ == "__main__":
    main()
