"""Writes the tables of the README from the committed results, between the marks that name them."""

import json
import re
from pathlib import Path

from . import models, units
from .harness import ROOT

README = ROOT.parent / "README.md"
TABLES = {"models": models, "units": units}


def markdown(path: Path, benchmark) -> str:
    """One results file as a table, with the machine and the commit that it was measured on."""
    result = json.loads(path.read_text())
    environment, settings = result["environment"], result["settings"]
    lines = [" | ".join(benchmark.HEADER), " | ".join("---" for _ in benchmark.HEADER)]
    lines += [" | ".join(benchmark.cells(row)) for row in result["rows"]]
    source = (
        f"{environment['device']}; {settings['dtype']}, batch {settings['batch']}; torch {environment['torch']}, timm {environment['timm']}; "
        f"commit {environment['commit']}, {environment['date']}; [{path.name}]({path.relative_to(README.parent)})"
    )
    return "\n".join([source, "", *(f"| {line} |" for line in lines)])


def main() -> None:
    text = README.read_text()
    for name, benchmark in TABLES.items():
        results = sorted((ROOT / "results").glob(f"*/{name}.json"))
        tables = "\n\n".join(markdown(path, benchmark) for path in results)
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda match: f"{match[1]}{tables}\n{match[2]}", text, flags=re.DOTALL
        )
        if not found:
            raise SystemExit(f"README.md has no marks for {name}")
    README.write_text(text)


if __name__ == "__main__":
    main()
