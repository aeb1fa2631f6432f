"""The Triton backend: its tests, which need Triton's interpreter, in a process that has it; and what it says where it cannot run."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sk_fused
from sk_fused.backends import native, native_on_cuda, reference, triton

from .test_operators import run_python

GPU = torch.device("cuda", 0)

# Where `make test` installs the oldest triton that the kernels are for.
OLDEST = Path(__file__).parent.parent / ".venv/oldest"


class Branch:
    """What why_not looks at, of a tensor on a GPU that need not be there."""

    device, is_cuda, is_cpu, dtype, shape = GPU, True, False, torch.float32, (2, 3, 4, 5)


@pytest.fixture(autouse=True)
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Of the GPU; it is another one after a call."""

    def has(major: int, minor: int) -> None:
        monkeypatch.setattr(triton, "_capability", lambda device: (major, minor))

    has(9, 0)
    monkeypatch.setattr(native_on_cuda, "why_not", lambda *_: "there are no native kernels: for a test")
    return has


def branch(**changes) -> Branch:
    instance = Branch()
    vars(instance).update(changes)
    return instance


@pytest.mark.parametrize("which", ["operators", "units"])
def test_under_the_interpreter(which: str):
    file = f"tests/triton_{which}.py"
    run = run_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "error:sk_fused:RuntimeWarning", file, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout and "failed" not in run.stdout and "skipped" not in run.stdout


def schemas(library: str) -> dict[str, torch.FunctionSchema]:
    """Of all operators of a library, by what stands after its name."""
    prefix = f"{library}::"
    return {str(schema).removeprefix(prefix): schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(prefix)}


def test_operators_are_those_of_the_native_backend_and_of_the_reference():
    ours = schemas("sk_fused_triton")
    assert ours and ours.keys() == schemas("sk_fused").keys()
    for text, schema in ours.items():
        name = text.partition("(")[0]
        operators = [getattr(library, name).default for library in (torch.ops.sk_fused_triton, torch.ops.sk_fused)]
        assert [getattr(backend, name) for backend in (triton, native)] == operators
        assert operators[0].tags == operators[1].tags
        assert [argument.name for argument in schema.arguments] == [*inspect.signature(getattr(reference, name)).parameters]


def test_why_not(capability: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch):
    assert triton.why_not([branch()] * 8) is None
    assert triton.why_not([branch(device=torch.device("cpu"))]) == "the Triton kernels run on a GPU, the branches are on cpu"
    assert "the branches are torch.int32" in triton.why_not([branch(dtype=torch.int32)])
    assert "at most 8 branches, got 9" in triton.why_not([branch()] * 9)
    assert "the batch is empty" in triton.why_not([branch(shape=(0, 3, 4, 5))])
    capability(7, 5)
    assert triton.why_not([branch()]) == "the Triton kernels are for compute capability 8.0 and up, cuda:0 has 7.5"
    capability(9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton.why_not([branch()]) == "the Triton kernels are for NVIDIA GPUs, this build of PyTorch is for ROCm 6.4"


def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """The native kernels, then Triton's, then the reference."""
    with monkeypatch.context() as there:
        there.setattr(native_on_cuda, "why_not", lambda *_: None)
        assert sk_fused.backends.choose([branch()]) is native
        with sk_fused.use_backend("triton"):
            assert sk_fused.backends.choose([branch()]) is triton
    assert sk_fused.backends.choose([branch()]) is triton
    monkeypatch.setattr(triton, "_why_not_triton", lambda: "triton is not there: for a test")
    with pytest.warns(RuntimeWarning, match="there are no native kernels: for a test; triton is not there: for a test"):
        assert sk_fused.backends.choose([branch()]) is sk_fused.backends.reference
    with sk_fused.use_backend("triton"), pytest.raises(RuntimeError, match="the backend 'triton' was forced, but triton is not there"):
        sk_fused.backends.choose([branch()])


def test_cpu_tensors_only_under_the_interpreter():
    with sk_fused.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was forced, but the Triton kernels run on a GPU, the branches are on cpu"):
        sk_fused.FusedSelectiveKernel(8)(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize(("version", "reason"), [("3.6.0", None), ("3.10.1+git", None), ("3.5.1", "need triton 3.6 or later, 3.5.1 is installed")])
def test_version_of_triton(version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("triton.__version__", version)
    found = triton._why_not_import.__wrapped__()
    assert found is None if reason is None else reason in found


@pytest.mark.skipif(not OLDEST.exists(), reason="only `make test` installs the oldest triton, beside the pinned one")
def test_kernels_compile_with_the_oldest_triton():
    """All kernels in their usual configurations, without a spill and to the instructions meant. Its interpreter is not run: that of 3.6
    needs an older numpy."""
    said = run_python("-c", "import triton; print(triton.__version__)", PYTHONPATH=str(OLDEST))
    assert said.stdout.strip() == "3.6.0", said.stderr
    tests = ("tests/test_triton_compile.py", "tests/test_triton_branch.py", "-k", "without_spills and 80 or to_the_instructions and 90")
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, PYTHONPATH=str(OLDEST))
    assert run.returncode == 0, run.stdout
    assert "2 passed" in run.stdout


def test_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None; import torch, sk_fused; from sk_fused.backends import triton\n"
        "sk_fused.FusedSelectiveKernel(8)(torch.randn(2, 8, 4, 4)); print(triton._why_not_triton())"
    )
    run = run_python("-c", script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("triton is not there")


def test_launches_on_the_device_of_the_operands(monkeypatch: pytest.MonkeyPatch):
    """Device 1 while 0 is current: the guard is entered with the operand, and left."""
    said = []

    class Guard:
        def __init__(self, operand):
            self.operand = operand

        def __enter__(self):
            said.append(("enter", self.operand))

        def __exit__(self, *_):
            said.append(("exit", self.operand))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(triton, "_kernel", lambda *_: lambda *_: said.append("launch"))
    ys, g = [torch.zeros(1)], torch.ones(1)
    triton._launcher("select", "select")(ys)
    triton._launcher("squeeze", "select_backward_sums")(g, ys)
    assert said == [("enter", ys[0]), "launch", ("exit", ys[0]), ("enter", g), "launch", ("exit", g)]
