"""Builds the native extension; everything else stands in pyproject.toml.

SK_FUSED_NATIVE=0 leaves the extension out: a pure Python package that runs the reference.
"""

import os
from pathlib import Path

from setuptools import setup


def extensions() -> tuple[list, dict]:
    if os.environ.get("SK_FUSED_NATIVE", "1") == "0":
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = ["csrc/library.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
    # at::parallel_for is a header and needs -fopenmp to be parallel. It is not a link flag: the runtime is the one that
    # libtorch has loaded; a second one would bring a second pool of threads.
    flags = ["-O3", "-g0", "-std=c++20", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-fvisibility=hidden", "-fopenmp"]
    extension = CppExtension("sk_fused._C", sources, extra_compile_args={"cxx": flags})
    return [extension], {"build_ext": BuildExtension.with_options(use_ninja=True)}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
