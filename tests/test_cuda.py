"""The CUDA kernels without a GPU: their text, compiled for the host, runs the tests of the operators; and the extension has them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sk_fused.backends import native, native_on_cuda

from .cuda_on_host.build import ROOT, build, preloaded
from .test_operators import OPERATORS, operands

needs_cuda_kernels = pytest.mark.skipif(not native._C.cuda_architectures, reason="the extension was built without nvcc")


@pytest.fixture(scope="module")
def library() -> Path:
    return build(ROOT / "build/cuda_on_host")


# In which order blocks and threads run, how many blocks the device holds, and the tests of test_operators.py.
RUNS = {
    "all": (1, 3, "not instruction_set and not threads and not memory and not (opcheck and (float16 or float64))"),
    "one block": (2, 1, "matches_reference and not silu and float32 and not 67 and not 31"),
    "many blocks": (3, 40, "matches_reference and bfloat16 and not 67 and not 31 or small_operators and float32"),
}


@pytest.mark.parametrize("name", RUNS)
def test_kernels_on_the_host(name: str, library: Path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, with outputs that are NaN before they are written."""
    seed, processors, which = RUNS[name]
    output = run_on_host(library, seed, processors, "tests/test_operators.py", "-k", which)
    assert " passed" in output and "failed" not in output and "skipped" not in output


def run_on_host(library: Path, seed: int, processors: int, *arguments: str) -> str:
    environment = {
        **os.environ,
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_ON_HOST_LIBRARY": str(library),
        "CUDA_ON_HOST_SEED": str(seed),
        "CUDA_ON_HOST_PROCESSORS": str(processors),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-p", "tests.cuda_on_host.plugin", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout


HASHES = """
import hashlib, os, torch
torch.set_num_threads(1)
torch.manual_seed(0)
import benchmarks.harness
benchmarks.harness.let_timm_import()
from tests import test_operators
from tests.cuda_on_host import plugin
for layout in ("contiguous", "channels_last"):
    for name, arguments in test_operators.operands((2, 3, 12, 19, 17), torch.float32, layout).items():
        outputs = test_operators.flat(getattr(test_operators.native, name)(*arguments))
        print(name, layout, *(hashlib.sha256(output.contiguous().numpy().tobytes()).hexdigest()[:16] for output in outputs))
"""


def test_results_depend_neither_on_the_order_nor_on_the_device(library: Path):
    """To the bit."""
    results = []
    for seed, processors in ((1, 1), (2, 5), (3, 40)):
        environment = {"LD_PRELOAD": preloaded(), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "PYTHONPATH": str(ROOT)}
        environment |= {"CUDA_ON_HOST_LIBRARY": str(library), "CUDA_ON_HOST_SEED": str(seed), "CUDA_ON_HOST_PROCESSORS": str(processors)}
        run = subprocess.run([sys.executable, "-c", HASHES], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results.append(run.stdout)
    assert len(results[0].splitlines()) == 2 * len(OPERATORS)
    assert results[0] == results[1] == results[2]


@needs_cuda_kernels
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_there_for_cuda_and_refuses_the_cpu(name: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sk_fused::{name}", "CUDA")
    operator, keys = getattr(native, name), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(ValueError, match="expected a tensor on cuda, got one on cpu"):
        operator.redispatch(keys, *operands((2, 2, 5, 4, 6), torch.float32)[name])


def cuobjdump() -> str:
    triton = Path(torch.__file__).parent.parent / "triton/backends/nvidia/bin"
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=triton)
    assert found, "no cuobjdump: it comes with CUDA and with triton"
    return found


@needs_cuda_kernels
def test_kernels_keep_all_in_registers():
    """On every architecture no kernel has a stack frame, and so none spills. The table is printed."""
    said = subprocess.run([cuobjdump(), "--dump-resource-usage", native._C.__file__], check=True, capture_output=True, text=True).stdout
    said = subprocess.run(["c++filt"], input=said, check=True, capture_output=True, text=True).stdout
    kernels: dict[str, dict[str, tuple[int, ...]]] = {}
    architecture = ""
    for line in said.splitlines():
        if match := re.search(r"sm_(\w+)", line.partition("Function")[0]):
            architecture = match[1]
        elif match := re.search(r"Function .*?(_\w+_kernel<[^>]*>)", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            kernels.setdefault(name, {})[architecture] = tuple(map(int, match.groups()))
    architectures = native._C.cuda_architectures.split()
    print("\nregisters", *architectures)
    for name, used in sorted(kernels.items()):
        print(name, *(used[architecture][0] for architecture in architectures))
    steps = ("branch_statistics", "squeeze", "fold_backward", "attend", "attend_backward", "select", "select_backward")
    assert {name.partition("<")[0] for name in kernels} == {f"_{step}_kernel" for step in steps}
    for name, used in kernels.items():
        assert list(used) == architectures or set(used) == set(architectures), name
        assert all(stack == local == 0 for _, stack, _, local in used.values()), f"{name}: {used}"


def test_why_not_on_cuda(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda", 1)

    def why_not(architectures: str, capability: tuple[int, int], branches: int) -> str | None:
        monkeypatch.setattr(native._C, "cuda_architectures", architectures)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: capability)
        return native_on_cuda.why_not(device, branches)

    built = "80 90a 100 120"
    assert all(why_not(built, capability, 8) is None for capability in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0)))
    assert "7.5" in why_not(built, (7, 5), 2)
    assert "11.0" in why_not(built, (11, 0), 2)
    assert "without nvcc" in why_not("", (9, 0), 2)
    assert "at most 8 branches, got 9" in why_not(built, (9, 0), 9)


def test_convolutions_on_cuda_are_left_to_pytorch():
    shapes = [torch.Size((32, 16, 3, 3))] * 2
    reason = native.why_not_convolve(torch.Size((2, 32, 8, 8)), torch.float32, shapes, 1, [1, 2], 1, torch.device("cuda", 0))
    assert reason == "the native convolutions run on a CPU, the input is on a CUDA device"
