"""Which of several roads to one result is taken: by a table, else by what was measured on this machine, else by measuring now.

What is measured is kept in a file for each device, versions of torch, triton and this package, and text of its kernels, in
SK_FUSED_CACHE, or sk_fused in XDG_CACHE_HOME, which is ~/.cache if it is not set. SK_FUSED_MEASURE=0 measures nothing: what is in neither table
nor file takes the default. So it is with torch.use_deterministic_algorithms, since roads round differently; and, for that call
alone, while a CUDA graph is captured or torch.compile traces.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton

import sk_fused

from .. import backends

# (name of the device, case): road. Written from results under benchmarks/results; there are none yet.
TABLE: dict[tuple[str, str], str] = {}


def choose(
    case: str, roads: Mapping[str, Callable[[], object]], default: str, device: str | None, timer: Callable[[Callable[[], object]], float] | None = None
) -> str:
    """The road for this case, one of `roads`.

    Args:
        case: the class of calls that one measurement is to decide about.
        roads: by name, what to run; each may be run a few times. One for which there is no memory is not taken.
        default: what is taken where nothing is known and nothing may be measured.
        device: its name; None: the default is taken.
        timer: gives the time that a road takes; None: that on the current GPU.
    """
    if device is None or len(roads) == 1:
        return default
    known = TABLE.get((device, case)) or _measured(device).get(case)
    if known in roads:
        return known
    wanted = os.environ.get("SK_FUSED_MEASURE") != "0" and not torch.are_deterministic_algorithms_enabled()
    if not wanted or torch.compiler.is_compiling() or _is_capturing():
        return default
    with torch.no_grad():
        times = {road: (timer or _milliseconds)(run) for road, run in roads.items() if _runs(run)}
    road = min(times, key=times.__getitem__, default=default)
    if len(times) == len(roads):
        _keep(device, case, road)
    else:
        # Memory may be less scarce another time.
        _measured(device)[case] = road
    return road


def _runs(run: Callable[[], object]) -> bool:
    """Whether the device has the memory for a road: for its results, or in a multiprocessor. It has compiled its kernels then."""
    try:
        run()
    except (torch.OutOfMemoryError, triton.runtime.errors.OutOfResources):
        return False
    return True


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# Of the GPU's clock: about five milliseconds, more than the launches of a road take.
_BUSY = 10_000_000


def _milliseconds(run: Callable[[], object]) -> float:
    """The median of five. The GPU is kept busy while a call is being launched, so that the time is the kernels', and not the host's."""
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_BUSY)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _file(device: str) -> Path:
    """Where the roads measured on this device with these versions and kernels are."""
    directory = os.environ.get("SK_FUSED_CACHE")
    if not directory:
        try:
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sk_fused"
        except RuntimeError:
            # A user without a home, as in some containers.
            directory = Path(tempfile.gettempdir()) / "sk_fused"
    key = f"{device} torch {torch.__version__} triton {triton.__version__} sk_fused {sk_fused.__version__} {_kernels()}"
    return Path(directory) / f"{re.sub('[^a-z0-9.]+', '-', key.lower())}.json"


@functools.cache
def _kernels() -> str:
    """A short name of the kernels' text: in a checkout it changes where the version does not."""
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:8]


@functools.cache
def _measured(device: str) -> dict[str, str]:
    """Case: road; what this process knows of its file."""
    return _read(_file(device))


def _read(file: Path) -> dict[str, str]:
    try:
        roads = json.loads(file.read_text())
        if isinstance(roads, dict) and all(isinstance(road, str) for road in roads.values()):
            return roads
        reason = "it is no table of names"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        reason = error
    backends.warn_once(f"sk_fused measures anew, because {file} cannot be read: {reason}")
    return {}


def _keep(device: str, case: str, road: str) -> None:
    """Writes the file with this case in it beside the old one, and renames it: readers see the one or the other."""
    known, file = _measured(device), _file(device)
    # Other processes may have added to it. What is known for want of memory is not to be in it.
    kept = {**_read(file), case: road}
    known.update({**kept, **known, case: road})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as beside:
            json.dump(kept, beside, indent=1, sort_keys=True)
        os.replace(beside.name, file)
    except OSError as error:
        backends.warn_once(f"sk_fused measures again in the next process, because {file} cannot be written: {error}")
