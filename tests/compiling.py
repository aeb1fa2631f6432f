"""Compiles the kernels that a call would launch, for a GPU that is not there."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


class Compiled(NamedTuple):
    """`spilled`: bytes of a thread's stack."""

    name: str
    arch: int
    registers: int
    spilled: int
    shared: int
    ptx: str


class _Device:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int):
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)


def compiled(arch: int, call: Callable[[], object]) -> list[Compiled]:
    """The kernels that `call` launches, with the arguments that it gives them, specialised as they would be; none is run."""
    kernels = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    run = JITFunction.run
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(driver, "_active", _Device(arch)):
        call()
    return [_measured(name, arch, kernel) for name, kernel in kernels]


def _measured(name: str, arch: int, kernel: triton.compiler.CompiledKernel) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return Compiled(name, arch, registers, stack, kernel.metadata.shared, kernel.asm["ptx"])
