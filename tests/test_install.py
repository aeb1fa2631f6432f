"""What is installed, with the extension and without, and what `python -m sk_fused` says of it."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sk_fused
from sk_fused.backends import native

ROOT = Path(__file__).parent.parent


def run_python(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    run = subprocess.run([sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as SK_FUSED_NATIVE=0 installs it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("pure")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("sk_fused", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run_python("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target), str(source), SK_FUSED_NATIVE="0")
    assert not list(target.rglob("*.so"))
    return target


def test_report_of_the_installation():
    lines = run_python("-m", "sk_fused").splitlines()
    assert lines[0].startswith(f"sk_fused {sk_fused.__version__}, Python {sys.version.split()[0]}")
    assert f"torch {torch.__version__}" in lines[1] and "timm" in lines[1] and "numpy" in lines[1]
    assert "  native: yes" in lines and "  reference: yes" in lines
    assert lines[-2].startswith("architectures of the native CUDA kernels: ")
    assert lines[-1] == f"instruction set of the native CPU kernels: {native._C.instruction_set()}"
    assert run_python("-m", "sk_fused", SK_FUSED_ISA="base").splitlines()[-1].endswith(": base")


def test_needs_torch_and_numpy_only():
    assert sorted(metadata.requires("sk_fused") or ()) == ["numpy", "torch>=2.11"]
    assert metadata.version("sk_fused") == sk_fused.__version__


@pytest.mark.parametrize("wanted, extensions", [("0", "[]"), ("1", "['sk_fused._C']")])
def test_extensions_that_setup_builds(wanted: str, extensions: str):
    code = "from distutils.core import run_setup; print([e.name for e in run_setup('setup.py', stop_after='init').ext_modules or []])"
    assert run_python("-c", f"import setuptools; {code}", SK_FUSED_NATIVE=wanted).strip() == extensions


# An nvcc that knows these, as setup.py asks it.
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release $RELEASE, V$RELEASE.1" ;;
--list-gpu-code) echo sm_80 sm_90 ;;
esac
"""


def test_the_nvcc_that_is_named_goes_first_and_has_to_know_what_is_wanted(tmp_path: Path):
    for folder in ("named/bin", "path"):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(NVCC)
        nvcc.chmod(0o755)
    code = """
import runpy, setuptools
setuptools.setup = lambda **_: None
setup = runpy.run_path("setup.py")
print(setup["find_nvcc"]())
try:
    print(*setup["Nvcc"](setup["find_nvcc"]()).architectures)
except RuntimeError as error:
    print(error)
"""

    def built(wanted: str, **environment: str) -> list[str]:
        path = os.pathsep.join((str(tmp_path / "path"), os.environ["PATH"]))
        environment = {"SK_FUSED_NATIVE": "0", "SK_FUSED_CUDA": wanted, "RELEASE": "12.4", "PATH": path, "CUDA_HOME": "", **environment}
        return run_python("-c", code, **environment).splitlines()

    assert built("1", CUDA_HOME=str(tmp_path / "named")) == [str(tmp_path / "named/bin/nvcc"), "80 90a"]
    assert built("90a") == [str(tmp_path / "path/nvcc"), "90a"]
    for wanted in ("90", "90 80", "80 100"):
        assert f"SK_FUSED_CUDA: expected 0, 1 or some of 80 90a 100 120, as {tmp_path / 'path/nvcc'} knows them, got {wanted}" in built(wanted)[1]


def run_pure(pure: Path, *arguments: str) -> str:
    """Without site, whose finder of an editable install would find the extension after all."""
    packages = Path(torch.__file__).parent.parent
    return run_python("-S", *arguments, cwd=pure, PYTHONPATH=os.pathsep.join(map(str, (pure, packages))))


def test_a_pure_python_install_works(pure: Path):
    code = """
import warnings, torch, sk_fused
unit = sk_fused.FusedSelectiveKernel(8)
x = torch.randn(2, 8, 5, 5, requires_grad=True)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    unit(x).sum().backward()
    unit(x)
print(sk_fused.__file__)
print(*(warning.message for warning in said), sep="\\n")
print(x.grad.isfinite().all().item())
"""
    file, *said, finite = run_pure(pure, "-c", code).splitlines()
    assert Path(file).is_relative_to(pure) and finite == "True"
    assert len(said) == 1 and said[0].startswith("sk_fused runs its plain PyTorch reference, because ")
    assert "the native extension is not there" in said[0]
    report = run_pure(pure, "-m", "sk_fused")
    assert "  native: the native extension is not there" in report and "instruction set" not in report


def test_a_pure_python_install_gives_the_same_numbers(pure: Path):
    """Run from its own folder, the tests of the unit that force the reference."""
    shutil.copytree(ROOT / "tests", pure / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "benchmarks", pure / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "results"))
    tests = ["tests/test_parity.py", "-k", "reference_backend or (dtypes_and_modes and reference and float32)"]
    output = run_pure(pure, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error::RuntimeWarning", *tests)
    assert " passed" in output and "failed" not in output
