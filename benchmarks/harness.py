"""What every benchmark needs: the command line, the parity gate, interleaved timing, memory, what the device can do at
best, and the record of it all. A benchmark supplies its set-up and its table; nothing is timed outside this file."""

import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .machine import REPOSITORY, ROOT, environment, folder_of, kernels

console = Console(width=None if Console().is_terminal else 160)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = {"eval": "eval", "train": "training step"}
# The two that everything is about.
PAIR = ("timm", "sk_fused")
PRECISIONS = ("float32", "tf32", "bfloat16")

# The factors of the parity rule. A peer may round as it likes, but it must compute the same thing in the same precision.
OURS, PEER = 2.0, 64.0


def let_timm_import() -> None:
    """torchvision's binary cannot load beside a CPU build of torch; with these two schemas its Python part can, and so timm."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def precision(name: str, device: torch.device) -> contextlib.AbstractContextManager:
    """float32, with tf32 in the matrix units if asked for (`command` sets it), or bfloat16 autocast."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else contextlib.nullcontext()


def ceilings(device: torch.device, precision: str) -> dict[str, float]:
    """What the device does at best, measured here and now: GB/s of a copy too large for any cache, and GFLOP/s of the
    faster of a matrix product and a dense convolution."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    n, C, size = (2048, 256, 28) if device.type == "cpu" else (8192, 512, 56)
    a = torch.randn(n, n, device=device, dtype=dtype)
    x = torch.randn(8, C, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(C, C, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    runs = {
        "copy": lambda: target.copy_(source),
        "product": lambda: a @ a,
        "convolution": lambda: nn.functional.conv2d(x, weight, padding=1),
    }
    with torch.inference_mode():
        best = {name: min(times) for name, times in interleaved(runs, 1.0, device).items()}
    flops = max(2 * n**3 / best["product"], 2 * 9 * C * x.numel() / best["convolution"])
    return {"copy_GBps": 2 * source.nbytes / best["copy"] / 1e6, "matrix_GFLOPs": flops / 1e6}


class Step(NamedTuple):
    """What a contender does: `run` is timed; `collect` takes what it returned and gives the tensors to check."""

    run: Callable[[], object]
    collect: Callable[[object], list[Tensor]]


class Entry(NamedTuple):
    """One contender in one layout: how to make its step, and the parity rule's factor for it; None: it is there for
    comparison, computes something else and is not checked. And whether it has threads that are not PyTorch's."""

    make: Callable[[], Step]
    factor: float | None
    own_threads: bool = False


# What `clock` times.
Part = Literal["call", "host", "kernels"]

# Of a GPU's clock: about half a millisecond, more than the host takes to launch an operator.
_BUSY = 1_000_000


def clock(device: torch.device, of: Part = "call") -> Callable[[Callable[[], object]], float]:
    """Milliseconds of one call: by the host's clock on a CPU, by events with a cold L2 cache on a GPU. There also of the "host" alone, until
    the call returns, to a GPU that has nothing to do; and of the "kernels" alone, the GPU kept busy while they are launched."""

    def host(run: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    if device.type == "cpu" or of == "host":
        return host
    cold = torch.empty(256 << 20, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def events(run: Callable[[], object]) -> float:
        cold.zero_()
        if of == "kernels":
            torch.cuda._sleep(_BUSY)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return events


def interleaved(contenders: Mapping, seconds: float, device: torch.device, min_rounds: int = 5, rest: float = 0.0, of: Part = "call") -> dict:
    """Milliseconds of every contender in every round: all take their turn in each round, A B C A B C, after one warm-up
    round, for about `seconds`. After a rest of so many, if there is one, a call that is not timed wakes the threads up."""
    measure, times = clock(device, of), {name: [] for name in contenders}
    for run in contenders.values():
        run()
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    rounds = 0
    try:
        while rounds < min_rounds or time.perf_counter() < end:
            for name, run in contenders.items():
                if rest:
                    time.sleep(rest)
                    run()
                times[name].append(measure(run))
            rounds += 1
    finally:
        gc.enable()
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Quartiles of the ratio, pair by pair: what slows a whole round down slows both."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


def race(
    entries: Mapping[tuple[str, str], Entry],
    exact: Sequence[Tensor],
    seconds: float,
    device: torch.device,
    base: str = "timm",
    against: Sequence[str] = ("timm",),
    of: Part = "call",
) -> dict[str, dict]:
    """The parity gate, then the interleaved rounds of all that passed.

    `entries` are keyed by side and layout. Each is checked against `exact` (float64) beside what `base` has in its
    layout; what fails is not timed. Timed as `clock` says. A side is quoted in its fastest layout:
    {best, median_ms, quartiles_ms, rounds, max_error, ratio: {side of `against`: quartiles}, layouts}; or {error} with the
    reason why it could not run, or must not be timed.
    """
    record: dict[str, dict] = {side: {"layouts": {}} for side, _ in entries}
    runs, checked = {}, {}
    # The base first: the others are checked beside it.
    for (side, layout), entry in sorted(entries.items(), key=lambda item: item[0][0] != base):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step = entry.make()
                # The second call of compiled code may be another than the first.
                step.run()
                output = step.run()
        except Exception as error:
            if side == base:
                raise
            record[side]["layouts"][layout] = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
            continue
        figures = record[side]["layouts"][layout] = {}
        if entry.factor is not None:
            results = [result.detach().clone() for result in step.collect(output)]
            if side == base:
                checked[layout] = results
            wrong = parity_failures(results, checked[layout], exact, entry.factor)
            figures["max_error"] = error_of(results[0], exact[0])
            if wrong:
                figures["error"] = f"parity failed: {wrong[0]}"
                continue
        runs[side, layout] = step.run
    # Threads wait actively for a while after their work, and would keep the cores from those of another runtime.
    rest = 0.02 if any(entry.own_threads for entry in entries.values()) else 0.0
    times = interleaved(runs, seconds, device, rest=rest, of=of)
    for key, values in times.items():
        low, median, high = quartiles(values)
        record[key[0]]["layouts"][key[1]] |= {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(values)}
    for side, figures in record.items():
        timed = {layout: f for layout, f in figures["layouts"].items() if "median_ms" in f}
        if timed:
            best = min(timed, key=lambda layout: timed[layout]["median_ms"])
            figures |= {"best": best, **timed[best]}
        else:
            errors = [f["error"] for f in figures["layouts"].values() if "error" in f]
            figures["error"] = errors[0]
    for side, figures in record.items():
        figures["ratio"] = {
            other: ratios(times[side, figures["best"]], times[other, record[other]["best"]])
            for other in against
            if "best" in figures and "best" in record.get(other, {})
        }
    return record


def error_of(value: Tensor, exact: Tensor) -> float:
    """Largest absolute error against a float64 result."""
    return (value.double() - exact).abs().max().item()


def within_parity(ours: Tensor, theirs: Tensor, exact: Tensor, factor: float = OURS) -> bool:
    """The parity rule: our error is at most `factor` times theirs, plus a few ulp of the largest value."""
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    return error_of(ours, exact) <= factor * error_of(theirs, exact) + 2 * factor * ulp


def usual_error(value: Tensor, exact: Tensor) -> float:
    """The absolute error against a float64 result that 99 of 100 values keep within; infinite if any is not finite."""
    errors = (value.double() - exact).abs().flatten()
    if not errors.isfinite().all():
        return torch.inf
    k = -(-99 * len(errors) // 100)
    # On a GPU kthvalue is the work of one block.
    return (errors.sort().values[k - 1] if errors.is_cuda else errors.kthvalue(k).values).item()


def parity_failures(ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor], factor: float = OURS) -> list[str]:
    """What breaks the rule, one sentence each. Where a rounding error carries a value over the kink of a ReLU a gradient
    jumps, in any implementation; among millions of values some do. So here the rule is held for 99 of 100 values, and the
    largest error is to be below a tenth of the largest value, or within the rule itself. (The tests hold it for all.)"""
    failures = []
    for i, (o, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        if o.shape != e.shape:
            failures.append(f"tensor {i} of {len(exact)}: shape {tuple(o.shape)}, expected {tuple(e.shape)}")
            continue
        ulp = torch.finfo(o.dtype).eps * e.abs().max().item()
        usual = usual_error(o, e) <= factor * usual_error(t, e) + 2 * factor * ulp
        if not usual or not (within_parity(o, t, e, factor) or error_of(o, e) <= 0.1 * e.abs().max().item()):
            failures.append(
                f"tensor {i} of {len(exact)}: error {usual_error(o, e):.1e}, timm's {usual_error(t, e):.1e}, for 99 of 100 values; "
                f"largest {error_of(o, e):.1e}, timm's {error_of(t, e):.1e}"
            )
    return failures


def bytes_kept(forward: Callable[[], object], module: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the distinct storages that a forward keeps for its backward, beside the parameters, buffers and inputs."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), *inputs)}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


class Passes(TorchDispatchMode):
    """Counts, while it is entered, the operators called (views and the convolutions aside) and the passes over a branch, as
    the operators see them: the values that they read or wrote, in branches of `size` values."""

    IGNORED = ("conv", "detach", "empty", "as_strided")

    def __init__(self, size: int):
        super().__init__()
        self.size, self.operators, self.values = size, 0, 0

    @property
    def passes(self) -> float:
        return round(self.values / self.size, 1)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not any(name in function.__name__ for name in self.IGNORED):
            self.operators += 1
            # copy_ does not read what it writes; an expanded tensor is not in memory.
            read = args[1:] if function.__name__.startswith("copy_") else args
            leaves = torch.utils._pytree.tree_leaves((read, kwargs, result))
            self.values += sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor) and 0 not in leaf.stride())
        return result


def in_new_process(function: str, *arguments: object, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()):
    """What `function` ("module:name", called with the arguments) returns in a Python process of its own, all as JSON has it;
    `prefix` goes before the command.

    Raises:
        RuntimeError: it failed; with the last line that it said.
    """
    module, name = function.split(":")
    call = f"import json, sys; from {module} import {name}; print(json.dumps({name}(*json.loads(sys.argv[1]))))"
    command = [*prefix, sys.executable, "-W", "ignore", "-c", call, json.dumps(arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Benchmark(NamedTuple):
    """A benchmark: its set-up and its table. `command` runs it, `report` shows it."""

    # Of its results file.
    name: str
    # What it measures: the help text, and, its first sentence, the title in reports.
    doc: str
    # Measures, one row after the other. Takes the parsed arguments, with `ceilings` added.
    rows: Callable[[Namespace], Iterable[dict]]
    # The table: what the columns of these rows are, and the text of one row's cells.
    table: Callable[[list[dict]], tuple[list[str], list[list[str]]]]
    # Draws the rows: (result, path of the PNG).
    figure: Callable[[dict, Path], None] | None = None
    # Its own options.
    options: Callable[[ArgumentParser], None] = lambda parser: None
    # Values of the options under --quick.
    quick: Mapping[str, object] = {}

    @property
    def title(self) -> str:
        return self.doc.split(":")[0]


def keep_memory() -> None:
    """Freed memory stays with the process, as it does in one that has run for a while: whether glibc has already learnt to
    keep large blocks differs from run to run, and the page faults of new ones can double the time of an eager module."""
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(mmap_threshold, 32 << 20)
            libc.mallopt(trim_threshold, 2**31 - 1)


def command_line(benchmark: Benchmark, argv: Sequence[str] | None = None) -> tuple[ArgumentParser, Namespace]:
    """The options of a benchmark, and what they are."""
    quick = ", ".join(f"{option} {value if isinstance(value, (int, float, str)) else ' '.join(map(str, value))}" for option, value in benchmark.quick.items())
    parser = ArgumentParser(prog=f"python -m benchmarks.{benchmark.name}", description=benchmark.doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"), help="where it runs")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16 is autocast")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each interleaved measurement (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"under two minutes on two cores: {quick}; kept apart, in {benchmark.name}-quick.json")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the results (default: benchmarks/results)")
    benchmark.options(parser)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**benchmark.quick)
    arguments = parser.parse_args(argv)
    if arguments.precision == "tf32" and arguments.device.type != "cuda":
        parser.error("--precision tf32 needs a GPU")
    # PyTorch's convolutions take it unless they are told not to.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.precision == "tf32"
    return parser, arguments


def command(benchmark: Benchmark, argv: Sequence[str] | None = None) -> Path:
    """The command line of a benchmark: measures, writes JSON, shows the table, draws the PNG; interrupted or broken, it writes the rows
    that it has. Ends with an error where a side of ours failed its parity check."""
    parser, arguments = command_line(benchmark, argv)
    settings = {name: _plain(value) for name, value in vars(arguments).items() if name != "results"}
    keep_memory()
    # Of what is measured, not of what has been edited meanwhile.
    measured = environment(arguments.device)
    arguments.ceilings = ceilings(arguments.device, arguments.precision)
    rows: list[dict] = []
    failure = None
    try:
        rows.extend(benchmark.rows(arguments))
    except (KeyboardInterrupt, Exception) as error:
        failure = None if isinstance(error, KeyboardInterrupt) else error
        console.print(f"{type(error).__name__}: the {len(rows)} rows measured so far are kept")
        settings["interrupted"] = f"{type(error).__name__}: {error}".split("\n")[0] if failure else True
    result = {"environment": measured, "settings": settings, "ceilings": arguments.ceilings, "rows": rows}
    # What is not the usual run is kept apart.
    unusual = {
        f"-batch-{arguments.batch}": arguments.batch != parser.get_default("batch"),
        f"-{arguments.precision}": arguments.precision != "float32",
        "-quick": arguments.quick,
    }
    name = benchmark.name + "".join(suffix for suffix, applies in unusual.items() if applies)
    path = arguments.results / folder_of(result["environment"]["device"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written: {path}")
    if failure:
        raise failure
    header, cells = benchmark.table(rows)
    show(f"{benchmark.title}\n{source(result)}", header, cells)
    failed = parity_failed(rows)
    if benchmark.figure and rows and not failed:
        benchmark.figure(result, path.with_suffix(".png"))
    if failed:
        raise SystemExit("parity failed: " + "; ".join(failed))
    return path


def _plain(value):
    """As JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def parity_failed(rows: object, name: str = "") -> list[str]:
    """Where, in a result's rows, a side of ours failed its parity check."""
    if isinstance(rows, list):
        return [failure for row in rows for failure in parity_failed(row, name)]
    if not isinstance(rows, dict):
        return []
    if str(rows.get("error", "")).startswith("parity failed") and name.startswith("sk_fused"):
        return [f"{name}, {rows['error']}"]
    return [failure for key, value in rows.items() for failure in parity_failed(value, name if key == "layouts" else str(key))]


def source(result: dict) -> str:
    """One line that says what a result was measured on."""
    e, s = result["environment"], result["settings"]
    return f"{e['device']}; {s['precision']}, batch {s['batch']}; torch {e['torch']}, timm {e['timm']}; commit {e['commit']}, {e['date']}"


def progress(items: Sequence, what: str) -> Iterator:
    """The items, with a bar on a terminal; quiet in a pipe."""
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
