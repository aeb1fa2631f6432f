"""`make gpu`: all that a GPU is needed for, in one command and under nine minutes: the build, the tests on the device, the
sanitizer on the CUDA kernels, the passes and units. A stage goes on where an earlier one failed; the last lines say which
passed. JSON and figures go to benchmarks/results/<device>/, beside the stages' output."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .machine import REPOSITORY, ROOT

# Of the tests, those that are small enough for a tool that makes every access hundreds of times slower.
SMALL = "(test_operator_matches_reference or test_convolutions_match_pytorch) and native and bfloat16 and channels_last"


class Stage(NamedTuple):
    """What it is called, its command, and the seconds after which it is given up."""

    name: str
    command: Sequence[str]
    seconds: int


def benchmark(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", "--device", "cuda", *options]


def stages(results: Path) -> list[Stage]:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    bfloat16 = ["--precision", "bfloat16", "--batch", "256", "--results", str(results)]
    measured = [
        Stage("passes", benchmark("passes", *bfloat16, "--seconds", "0.3"), 80),
        Stage("units", benchmark("units", *bfloat16, "--seconds", "0.5", "--contenders", "timm", "timm:compile", "sk_fused", "convolutions"), 150),
        Stage("models", benchmark("models", *bfloat16, "--seconds", "1", "--models", "skresnet18"), 60),
    ]
    sanitizers = [
        Stage(f"sanitizer: {tool}", ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *tests, "-x", "-k", SMALL], 60)
        for tool in ("memcheck", "racecheck")
    ]
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return [Stage("build", build, 180), Stage("tests", tests, 150), *measured, *(sanitizers if shutil.which("compute-sanitizer") else [])]


def run(stage: Stage, log: Path) -> str:
    """Its verdict; the output goes to the file."""
    start = time.monotonic()
    with open(log, "w") as output:
        try:
            code = subprocess.run(stage.command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, timeout=stage.seconds).returncode
            verdict = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            verdict = f"given up after {stage.seconds} s"
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return f"{stage.name:22} {verdict:24} {time.monotonic() - start:5.0f} s   {last[:100]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--logs", type=Path, default=Path("build/gpu"), help="folder of the stages' output (default: build/gpu)")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONPATH", str(REPOSITORY))
    verdicts = []
    for stage in stages(arguments.results):
        verdicts.append(run(stage, arguments.logs / f"{stage.name.replace(': ', '-')}.log"))
        print(verdicts[-1], flush=True)
    print("\n".join(["", *verdicts]))
    if any(" passed " not in verdict for verdict in verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
