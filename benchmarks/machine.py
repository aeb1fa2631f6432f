"""What a figure depends on beside the benchmark's settings: the device, the versions, the kernels' code."""

import ast
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent
REPOSITORY = ROOT.parent

# What the figures of a device depend on.
_PYTHON = ("sk_fused/functional.py", "sk_fused/modules.py", "sk_fused/backends/__init__.py", "sk_fused/backends/reference.py")
KERNELS = {
    "cpu": (*_PYTHON, "sk_fused/backends/native.py", "csrc/*.*", "csrc/cpu/*"),
    "cuda": (*_PYTHON, "sk_fused/backends/*.py", "sk_fused/kernels/*.py", "csrc/*.*", "csrc/cuda/*"),
}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    return f"{model}, {torch.get_num_threads()} threads"


def folder_of(device: str) -> str:
    """The folder's name for a device of this name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def code_hash(path: Path) -> str:
    """Hash of a source file's code: its comments, docstrings and blank lines may change."""
    text = path.read_text()
    if path.suffix == ".py":
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                lines[docstring.lineno - 1 : docstring.end_lineno] = [""] * (docstring.end_lineno - docstring.lineno + 1)
        text = "\n".join(line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    else:
        text = "".join(re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL).split())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kernels(device_type: str) -> dict[str, str]:
    """The sources that a figure of this kind of device depends on, each with its code's hash."""
    paths = sorted({path for pattern in KERNELS[device_type] for path in REPOSITORY.glob(pattern)})
    return {str(path.relative_to(REPOSITORY)): code_hash(path) for path in paths}


def _commit() -> str:
    """What is checked out; "-dirty" if anything but results differs from it. A copy without its history is told by SK_FUSED_COMMIT."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""

    if os.environ.get("SK_FUSED_COMMIT"):
        return os.environ["SK_FUSED_COMMIT"]
    commit = git("describe", "--always") or "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results") else commit


def environment(device: torch.device) -> dict:
    """What a figure depends on beside the settings: device, versions, commit, the kernels' code."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: metadata.version(package) for package in ("timm", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
        "kernels": kernels(device.type),
    }
