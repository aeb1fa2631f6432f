"""Builds the native extension; everything else stands in pyproject.toml.

SK_FUSED_NATIVE=0 leaves the extension out: a pure Python package that runs its Triton kernels on a GPU, and elsewhere the reference.
The extension has CUDA kernels where there is an nvcc, in CUDA_HOME or on the path; no GPU is needed for that. SK_FUSED_CUDA=0 leaves
them out, SK_FUSED_CUDA="90a" builds for that architecture alone. SK_FUSED_WERROR=1 makes errors of nvcc's warnings: for tests, since
another version may have others.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

# What runs on 8.x, 9.0, 10.x and 12.x. A toolkit that is too old for one of them builds for the others.
ARCHITECTURES = ("80", "90a", "100", "120")


def find_nvcc() -> str | None:
    if os.environ.get("SK_FUSED_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    named = shutil.which("nvcc", path=f"{home}/bin") if home else None
    return named or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


class Nvcc:
    """Compiles csrc/cuda/*.cu. It does so itself: torch's CUDAExtension wants a torch that is built for CUDA."""

    def __init__(self, nvcc: str):
        self.nvcc = nvcc
        self.major = int(re.search(r"release (\d+)\.", self._run("--version").stdout)[1])
        known = self._run("--list-gpu-code").stdout.split()
        # 90a and its like are not listed by every version that knows them.
        wanted = os.environ.get("SK_FUSED_CUDA", "1").split()
        self.architectures = [arch for arch in ARCHITECTURES if f"sm_{arch.rstrip('a')}" in known and (wanted == ["1"] or arch in wanted)]
        if not self.architectures or wanted != ["1"] and set(wanted) != set(self.architectures):
            raise RuntimeError(f"SK_FUSED_CUDA: expected 0, 1 or some of {' '.join(ARCHITECTURES)}, as {nvcc} knows them, got {' '.join(wanted)}")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([self.nvcc, *arguments], check=True, capture_output=True, text=True)

    def library_folder(self) -> Path:
        """Where the static runtime is."""
        said = self._run("--dryrun", "-c", "none.cu").stderr
        top = Path(re.search(r"TOP=(\S+)", said)[1])
        for folder in ("targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib64", "lib"):
            if (top / folder / "libcudart_static.a").exists():
                return top / folder
        raise RuntimeError(f"no libcudart_static.a under {top}; SK_FUSED_CUDA=0 builds without CUDA")

    def compile(self, folder: Path) -> list[str]:
        """The objects, made anew where a source is newer."""
        folder.mkdir(parents=True, exist_ok=True)
        newest_header = max(path.stat().st_mtime for path in [Path(__file__), *Path("csrc/cuda").glob("*.*h")])
        flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-Wall,-fvisibility=hidden", "--threads", "2"]
        if os.environ.get("SK_FUSED_WERROR") == "1":
            flags += ["-Werror", "all-warnings"]
        for arch in self.architectures:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        sources = sorted(Path("csrc/cuda").glob("*.cu"))
        objects = [folder / f"{source.stem}-{'-'.join(self.architectures)}.o" for source in sources]

        def make(source: Path, output: Path) -> None:
            if not output.exists() or output.stat().st_mtime < max(newest_header, source.stat().st_mtime):
                subprocess.run([self.nvcc, *flags, "-c", str(source), "-o", str(output)], check=True)

        with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 2)) as pool:
            list(pool.map(make, sources, objects))
        return [str(path) for path in objects]


def extensions() -> tuple[list, dict]:
    if os.environ.get("SK_FUSED_NATIVE", "1") == "0":
        return [], {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp"))
    # at::parallel_for is a header and needs -fopenmp to be parallel. It is not a link flag: the runtime is the one that
    # libtorch has loaded; a second one would bring a second pool of threads.
    flags = ["-O3", "-g0", "-std=c++20", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-fvisibility=hidden", "-fopenmp"]
    extension = CppExtension("sk_fused._C", sources, extra_compile_args={"cxx": flags})
    build_ext = BuildExtension.with_options(use_ninja=True)
    path = find_nvcc()
    if path is None:
        return [extension], {"build_ext": build_ext}
    nvcc = Nvcc(path)
    if torch.version.cuda and nvcc.major > int(torch.version.cuda.partition(".")[0]):
        # Its runtime would want a newer driver than torch does.
        print(f"no CUDA kernels: {path} is of CUDA {nvcc.major}, torch of {torch.version.cuda}; another nvcc can be named by CUDA_HOME")
        return [extension], {"build_ext": build_ext}
    extension.sources.append("csrc/cuda/bindings.cpp")
    flags.append(f'-DSK_FUSED_CUDA="{" ".join(nvcc.architectures)}"')
    # The runtime is linked statically: the extension loads where there is no CUDA.
    extension.extra_link_args += [str(nvcc.library_folder() / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]

    class BuildWithCuda(build_ext):
        def build_extensions(self) -> None:
            extension.extra_objects += nvcc.compile(Path(self.build_temp) / "cuda")
            super().build_extensions()

    return [extension], {"build_ext": BuildWithCuda}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
