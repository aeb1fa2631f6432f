"""Instructions that the CPU kernels retire, counted by valgrind's callgrind: the same number on every run, however busy the
machine. One call of each native operator on a small unit, one thread, AVX2 (valgrind knows no AVX-512); only what is
executed inside the extension counts, not the dispatcher, Python or the C library."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import harness

BATCH, CHANNELS, SIZE = 2, 32, 12


def run() -> list[str]:
    """Calls every operator once for warmth and once counted, each layout; returns what was called. For a process in valgrind."""
    import torch

    from sk_fused.backends import native

    from .cases import Case
    from .passes import PASSES, Inputs

    torch.set_num_threads(1)
    called = []
    for layout in harness.LAYOUTS:
        inputs = Inputs(Case(dict(in_channels=CHANNELS), SIZE), BATCH, torch.device("cpu"), torch.float32, layout)
        for name, operator in PASSES.items():
            if "native" in operator.backends:
                with torch.inference_mode():
                    operator.call(native, inputs)
                    torch._C._valgrind_toggle()
                    operator.call(native, inputs)
                    torch._C._valgrind_toggle_and_dump_stats()
                called.append(f"{name}, {layout}")
    return called


def inside(lines: Iterable[str], library: str) -> int:
    """Instructions of a callgrind file that were executed in an object of this name."""
    objects: dict[str, str] = {}
    current, total, call = "", 0, False
    for line in lines:
        named = re.match(r"(c?ob)=(\(\d+\))(?: (.*))?", line)
        if named:
            kind, number, name = named.groups()
            objects[number] = name or objects[number]
            current = objects[number] if kind == "ob" else current
        elif line.startswith("calls="):
            call = True
        elif re.match(r"[\d+*-]", line):
            # After `calls=` stands the cost of what was called, which has its own lines.
            total += int(line.split()[-1]) if Path(current).name.startswith(library) and not call else 0
            call = False
    return total


def count() -> dict[str, int]:
    """Instructions of every operator.

    Raises:
        RuntimeError: there is no valgrind, or it failed.
    """
    if not shutil.which("valgrind"):
        raise RuntimeError("valgrind is not installed")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"]
        called = harness.in_new_process("benchmarks.instructions:run", environment={"SK_FUSED_ISA": "avx2", "PYTHONHASHSEED": "0"}, prefix=valgrind)
        return dict(zip(called, _counts(out, len(called)), strict=True))


def _counts(out: Path, dumps: int) -> Iterator[int]:
    for i in range(1, dumps + 1):
        with open(f"{out}.{i}") as lines:
            yield inside(lines, "_C.")
