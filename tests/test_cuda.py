"""The CUDA kernels without a GPU: their text, compiled for the host, runs the tests of the operators; and the extension has them."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sk_fused import backends
from sk_fused.backends import native, native_on_cuda

from .cuda_on_host.build import ROOT, build, preloaded
from .test_convolutions import OPERATORS as CONVOLUTIONS, operands as convolved
from .test_operators import OPERATORS, operands

needs_cuda_kernels = pytest.mark.skipif(not native._C.cuda_architectures, reason="the extension was built without nvcc")


@pytest.fixture(scope="module")
def library() -> Path:
    return build(ROOT / "build/cuda_on_host")


class Host(NamedTuple):
    """The device that the host plays: in which order blocks and threads run, how many blocks it holds, the bytes of its L2 cache, its
    compute capability."""

    seed: int
    processors: int
    cache: int = 1 << 20
    capability: int = 8

    def environment(self, library: Path) -> dict[str, str]:
        return {
            **os.environ,
            "LD_PRELOAD": preloaded(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "CUDA_ON_HOST_LIBRARY": str(library),
            "CUDA_ON_HOST_SEED": str(self.seed),
            "CUDA_ON_HOST_PROCESSORS": str(self.processors),
            "CUDA_ON_HOST_L2": str(self.cache),
            "CUDA_ON_HOST_CAPABILITY": str(self.capability),
        }


# And the tests that are run.
RUNS = {
    # Not `sample_is_far`, which fails here: these kernels' mean is an ulp of the outliers off.
    "all": (Host(1, 3), "test_operators", "not instruction_set and not threads and not memory and not sample_is_far and not (opcheck and (float16 or float64))"),
    "one block": (Host(2, 1), "test_operators", "matches_reference and not silu and float32 and not 67 and not 31"),
    "many blocks": (Host(3, 40), "test_operators", "matches_reference and bfloat16 and not 67 and not 31 or small_operators and float32"),
    "units": (Host(1, 3), "test_convolutions", "match_pytorch and (bfloat16 or float16)"),
    # Where the cache has room for two images, every convolution waits for the selection of the last but one.
    "units, one block": (Host(2, 1, cache=1), "test_convolutions", "match_pytorch and bfloat16 and channels_last"),
    "units, two blocks": (Host(3, 2, cache=1), "test_convolutions", "match_pytorch and float16 and channels_last"),
    # Where four warps multiply together.
    "units, 9.0": (Host(5, 3, capability=9), "test_convolutions", "match_pytorch and (bfloat16 or float16)"),
    "units, 9.0, one block": (Host(7, 1, cache=1, capability=9), "test_convolutions", "match_pytorch and bfloat16 and channels_last"),
    "units, 9.0, many blocks": (Host(6, 40, capability=9), "test_convolutions", "match_pytorch and bfloat16 and channels_last"),
    "units, many blocks": (Host(4, 40, cache=1), "test_convolutions", "match_pytorch and bfloat16 and channels_last"),
}


@pytest.mark.parametrize("name", RUNS)
def test_kernels_on_the_host(name: str, library: Path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, with outputs that are NaN before they are written."""
    host, module, which = RUNS[name]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-p", "tests.cuda_on_host.plugin"]
    run = subprocess.run([*command, f"tests/{module}.py", "-k", which], cwd=ROOT, env=host.environment(library), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout and "failed" not in run.stdout and "skipped" not in run.stdout


HASHES = """
import hashlib, os, torch
torch.set_num_threads(1)
torch.manual_seed(0)
import benchmarks.harness
benchmarks.harness.let_timm_import()
from tests import test_convolutions, test_operators
from tests.cuda_on_host import plugin


def show(name, layout, arguments):
    outputs = test_operators.flat(getattr(test_operators.native, name)(*arguments))
    print(name, layout, *(hashlib.sha256(output.contiguous().float().numpy().tobytes()).hexdigest()[:16] for output in outputs))


for layout in ("contiguous", "channels_last"):
    for name, arguments in test_operators.operands((2, 3, 12, 19, 17), torch.float32, layout).items():
        show(name, layout, arguments)
    for case in ("8 a group", "dense, small maps", "dense, many inputs, split"):
        show("unit", layout, test_convolutions.operands(case, torch.bfloat16, layout)["unit"])
"""


@pytest.mark.parametrize("hosts", [(Host(1, 1, 1), Host(2, 5), Host(3, 40, 100_000)), (Host(1, 1, capability=9), Host(2, 40, capability=9))])
def test_results_depend_neither_on_the_order_nor_on_the_device(hosts: tuple[Host, ...], library: Path):
    """To the bit; where four warps multiply together, it may be in another order."""
    results = []
    for host in hosts:
        environment = host.environment(library) | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", HASHES], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results.append(run.stdout)
    assert len(results[0].splitlines()) == 2 * (len(OPERATORS) + 3)
    assert all(result == results[0] for result in results)


@needs_cuda_kernels
@pytest.mark.parametrize("name", (*OPERATORS, *CONVOLUTIONS))
def test_operator_is_there_for_cuda_and_refuses_the_cpu(name: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sk_fused::{name}", "CUDA")
    operator, keys = getattr(native, name), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(ValueError, match="expected a tensor on cuda, got one on cpu"):
        operator.redispatch(keys, *(operands((2, 2, 5, 4, 6), torch.float32) | convolved("8 a group", torch.float16))[name])


def cuobjdump(*options: str) -> str:
    """What it says of the extension, with names as C++ has them. It needs nvdisasm beside it."""
    path = os.pathsep.join([os.environ["PATH"], str(Path(torch.__file__).parent.parent / "triton/backends/nvidia/bin")])
    found = shutil.which("cuobjdump", path=path)
    assert found, "no cuobjdump: it comes with CUDA and with triton"
    command = [found, *options, native._C.__file__]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PATH": path}).stdout
    return subprocess.run(["c++filt"], input=said, check=True, capture_output=True, text=True).stdout


@needs_cuda_kernels
def test_kernels_keep_all_in_registers():
    """On every architecture no kernel has a stack frame, and so none spills. The table is printed."""
    kernels: dict[str, dict[str, tuple[int, ...]]] = {}
    architecture = ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
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
    steps = ("branch_statistics", "squeeze", "fold_backward", "attend", "attend_backward", "select", "select_backward", "unit")
    assert {name.partition("<")[0] for name in kernels} == {f"_{step}_kernel" for step in steps}
    for name, used in kernels.items():
        assert list(used) == architectures or set(used) == set(architectures), name
        assert all(stack == local == 0 for _, stack, _, local in used.values()), f"{name}: {used}"


@needs_cuda_kernels
def test_select_takes_16_bytes_at_a_time():
    """Forward and backward: of branches in either layout, and in channels_last of its constants too, in which no access is narrower."""
    architecture = native._C.cuda_architectures.split()[-1]
    _, *kernels = cuobjdump("--dump-sass", "--gpu-architecture", f"sm_{architecture}").split("Function : ")
    seen = 0
    for kernel in kernels:
        if match := re.match(r"void sk::cuda::_select(?:_backward)?_kernel<\w+, (true|false), [248]>", kernel):
            accesses = re.findall(r"\b(LDG|STG)\.E(\S*)", kernel)
            wide = {name for name, width in accesses if "128" in width}
            assert wide == {"LDG", "STG"}, match[0]
            assert match[1] == "false" or all("128" in width for _, width in accesses), match[0]
            seen += 1
    # Four dtypes, two layouts.
    assert seen == 16


def test_why_not_on_cuda(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda", 1)

    def why_not(architectures: str, capability: tuple[int, int], branches: int) -> str | None:
        monkeypatch.setattr(native._C, "cuda_architectures", architectures)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: capability)
        native_on_cuda._why_not_device.cache_clear()
        return native_on_cuda.why_not(device, branches)

    built = "80 90a 100 120"
    assert all(why_not(built, capability, 8) is None for capability in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0)))
    assert "7.5" in why_not(built, (7, 5), 2)
    assert "11.0" in why_not(built, (11, 0), 2)
    assert "without nvcc" in why_not("", (9, 0), 2)
    assert "at most 8 branches, got 9" in why_not(built, (9, 0), 9)
    native_on_cuda._why_not_device.cache_clear()


def test_why_not_convolve_on_cuda():
    def why_not(inputs: int, outputs: int, groups: int = 1, dtype: torch.dtype = torch.bfloat16, stride: int = 1, pixels=(2, 8, 8), graph: bool = False) -> str | None:
        weights, (B, H, W) = [torch.Size((groups * outputs, inputs, 3, 3))] * 2, pixels
        return native.why_not_convolve(torch.Size((B, groups * inputs, H, W)), dtype, weights, stride, [1, 2], groups, True, graph)

    assert_taken_and_refused(functools.partial(why_not, graph=True))
    for inputs, groups in ((64, 1), (8, 32)):
        assert why_not(inputs, inputs, groups) is None
    for inputs, groups, stride in ((80, 1, 1), (16, 2, 1), (16, 1, 2)):
        assert "unless that is forced" in why_not(inputs, inputs, groups, stride=stride)
        with backends.use_backend("native"):
            assert why_not(inputs, inputs, groups, stride=stride) is None
    for pixels in ((2, 2**15, 2**15), (1, 1, 2**17)):
        assert "pixels" in why_not(64, 64, pixels=pixels)


def assert_taken_and_refused(why_not: Callable[..., str | None]) -> None:
    for taken in ((64, 64), (32, 40), (4, 4, 32), (8, 8, 3), (16, 16, 4, torch.float16, 2)):
        assert why_not(*taken) is None
    assert "float32" in why_not(64, 64, dtype=torch.float32)
    for inputs, outputs, groups in ((8, 16, 4), (4, 4, 5), (24, 24, 1), (16, 4, 2)):
        assert f"got {inputs} in, {outputs} out, {groups} groups" in why_not(inputs, outputs, groups)
    assert "stride 3" in why_not(16, 16, stride=3)
