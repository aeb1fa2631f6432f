"""Compiles csrc/cuda for the host: a library that puts its operators in the place of the CPU's."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))

# The kernels are checked for what they touch and for what C++ does not define; the scheduler jumps from stack to stack.
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def preloaded() -> str:
    """What has to be loaded first for the sanitizers to see all memory."""
    libraries = (f"lib{name}.so" for name in ("asan", "ubsan", "stdc++"))
    return ":".join(subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip() for name in libraries)


def build(folder: Path) -> Path:
    """The library, made anew where a source is newer."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "cuda_on_host.so"
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.*h"), *HERE.glob("*.h"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)
    kernel = ["-x", "c++", "-O1", "-g1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", f"-I{HERE}", *_SANITIZE]
    binding = ["-O0", "-DSK_CUDA_ON_HOST", *(f"-isystem{path}" for path in include_paths())]
    sources = [(ROOT / "csrc/cuda/bindings.cpp", binding), *((path, kernel) for path in KERNELS), (HERE / "cuda_on_host.cpp", ["-O2"])]

    def compile_one(source: Path, flags: list[str]) -> Path:
        output = folder / f"{source.stem}.o"
        if not output.exists() or output.stat().st_mtime < max(newest_header, source.stat().st_mtime):
            command = ["g++", "-std=c++20", "-fPIC", "-Wall", "-Werror", *flags, "-c", str(source), "-o", str(output)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
        return output

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda source: compile_one(*source), sources))
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run(["g++", "-shared", *_SANITIZE, *map(str, objects), *torch_libraries, "-o", str(library)], check=True)
    return library
