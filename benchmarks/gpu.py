"""`make gpu`: all that a GPU is needed for, in one command and under nine minutes: the build, the tests on the device, every kernel's share
of the copy bandwidth, units, the host's time and a network, and the sanitizer on the CUDA kernels. A stage goes on where an earlier one
failed; one that takes too long is interrupted, and keeps what it has measured; the last lines say which passed. JSON and figures go to
benchmarks/results/<device>/, the stages' output to build/gpu."""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .cases import MAIN
from .machine import REPOSITORY, ROOT

# Seconds that an interrupted stage has to write down what it has.
GRACE = 15

# Of the tests, those that are small enough for a tool that makes every access hundreds of times slower.
SMALL = "(test_operator_matches_reference or test_convolutions_match_pytorch) and native and bfloat16 and channels_last"


class Stage(NamedTuple):
    """What it is called, its command, and the seconds after which it is given up. Without a command: why there is none."""

    name: str
    command: Sequence[str] | str
    seconds: int


def benchmark(name: str, results: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", "--device", "cuda", "--results", str(results), *options]


def stages(results: Path) -> list[Stage]:
    """In the order of what is to be known first."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    beside = ["-n", "8", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    bfloat16 = ["--precision", "bfloat16", "--batch", "256"]
    sides = ["timm", "timm:compile", "sk_fused", "sk_fused:triton", "convolutions"]
    channels_last = ["--layouts", "channels_last"]
    memcheck, racecheck = (Stage(f"sanitizer: {tool}", sanitized(tool, [*tests, "-x", "-k", SMALL]), 80) for tool in ("memcheck", "racecheck"))
    return [
        Stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150),
        Stage("tests: native", [*tests, *beside, "-k", "native"], 100),
        Stage("passes", benchmark("passes", results, *bfloat16, "--seconds", "0.2"), 100),
        Stage("tests: triton", [*tests, *beside, "-k", "triton"], 140),
        Stage("units", benchmark("units", results, *bfloat16, "--seconds", "0.5", "--units", *MAIN[::4], *channels_last, "--contenders", *sides), 110),
        memcheck,
        Stage("overhead", benchmark("overhead", results, "--seconds", "0.5"), 45),
        Stage("models", benchmark("models", results, *bfloat16, "--seconds", "1", "--models", "skresnet18", *channels_last), 100),
        Stage("cold start", benchmark("cold_start", results, "--rounds", "1", "--kinds", "eager"), 40),
        racecheck,
    ]


def sanitized(tool: str, command: Sequence[str]) -> Sequence[str] | str:
    """The command under compute-sanitizer, which looks at our kernels alone if it knows how to."""
    if shutil.which("compute-sanitizer") is None:
        return "there is no compute-sanitizer"
    known = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True).stdout
    option = next((option for option in ("--kernel-name", "--kernel-regex") if option in known), None)
    ours = [option, "kns=sk4cuda"] if option else []
    # PyTorch itself makes calls that fail, and asks for their errors.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *ours, *quiet, *command]


def run(stage: Stage, log: Path, left: float) -> str:
    """Its verdict, after at most `left` seconds; the output goes to the file."""
    if isinstance(stage.command, str):
        return f"{stage.name:22} not run: {stage.command}"
    if left <= 0:
        return f"{stage.name:22} not run: no time left"
    start = time.monotonic()
    seconds = min(stage.seconds, left)
    with open(log, "w") as output:
        # In a session of its own, so that what it has started ends with it; and interruptible, which what a shell starts in the
        # background is not.
        process = subprocess.Popen(
            stage.command,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            code = process.wait(seconds)
            verdict = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            verdict = f"given up after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return f"{stage.name:22} {verdict:24} {time.monotonic() - start:5.0f} s   {last[:100]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="some only, by what their names begin with: build tests passes units …")
    parser.add_argument("--seconds", type=float, default=525, help="for all together (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--logs", type=Path, default=REPOSITORY / "build/gpu", help="folder of the stages' output (default: build/gpu)")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONPATH", str(REPOSITORY))
    # Where ninja is, for the build.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if torch.cuda.is_available():
        # The others take minutes to build, and do not run here.
        os.environ.setdefault("SK_FUSED_CUDA", {8: "80", 9: "90a", 10: "100", 12: "120"}.get(torch.cuda.get_device_capability()[0], "1"))
    end = time.monotonic() + arguments.seconds
    verdicts = []
    for stage in stages(arguments.results.resolve()):
        if arguments.stages is None or stage.name.startswith(tuple(arguments.stages)):
            log = arguments.logs / f"{stage.name.replace(': ', '-').replace(' ', '-')}.log"
            verdicts.append(run(stage, log, end - time.monotonic()))
            print(verdicts[-1], flush=True)
    print("\n".join(["", *verdicts]))
    if any(" passed " not in verdict for verdict in verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
