"""The Triton kernels, compiled for GPUs that are not here: registers, spills, width of accesses.

The launchers are called on tensors without memory, and what they would have compiled is collected; so there is no second list of
what the package chooses. Along every axis (dtype, layout, branches, activation, size of the maps, number of channels) each
value is compiled with the others at their usual one, for sm_90; sm_80 and sm_100 have another code generator, not other
configurations, and get the usual ones. All combinations, for one architecture, take a quarter of an hour on two cores:

    python -m tests.test_triton_compile 90
"""

import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sk_fused.functional import ACTIVATIONS
from sk_fused.kernels import attend, select, squeeze

from .parity import DTYPES, LAYOUTS

# Those that read branches, or a number for every image and channel: none of their registers may spill. Of the others, whose
# products are unrolled, a few bytes may.
STREAMING = ("_squeeze", "_statistics", "_select", "_fold")


class Call(NamedTuple):
    """One unit, by what the launchers look at."""

    dtype: torch.dtype = torch.bfloat16
    layout: str = "channels_last"
    M: int = 2
    activation: str = "relu"
    shape: Sequence[int] = (256, 64, 56, 56)


# Few branches and many, and where those take most registers.
MANY = [(torch.bfloat16, "channels_last", 1), (torch.bfloat16, "contiguous", 4), (torch.float64, "channels_last", 8), (torch.float64, "contiguous", 8)]

# Rows of whole vectors, and not; images, channels and pixels that are many and few; a size that no vector divides.
SHAPES = [(256, 64, 56, 56), (256, 512, 7, 7), (256, 128, 28, 28), (256, 256, 14, 14), (8, 64, 56, 56), (64, 16, 9, 8), (1, 3, 5, 7), (1, 10, 30, 30)]
# Also with batch-norms that have neither weight nor bias.
PLAIN = Call()
USUAL = [Call(layout=layout, shape=shape) for layout in LAYOUTS for shape in SHAPES[:2]]
AXES = [
    *USUAL,
    *(Call(dtype, layout, shape=shape) for dtype in DTYPES for layout, shape in zip(LAYOUTS, SHAPES[1::-1])),
    *(Call(layout=layout, shape=shape) for layout in LAYOUTS for shape in SHAPES[2:]),
    *(Call(layout=layout, activation=activation, shape=SHAPES[1]) for layout, activation in zip(("contiguous", *LAYOUTS), ACTIVATIONS[1:])),
    *(Call(dtype, layout, M) for dtype, layout, M in MANY),
]
ALL = [Call(*call) for call in itertools.product(DTYPES, LAYOUTS, (1, 2, 3, 4, 8), ACTIVATIONS, SHAPES)]


class Compiled(NamedTuple):
    name: str
    call: Call
    registers: int
    stack: int
    shared: int
    # Of global memory, by their width in bits: loads and stores.
    accesses: Counter
    # The instruction that multiplies matrices, if there is one; and whether tf32 is in any.
    products: str | None
    tf32: bool


class Device:
    """Stands for the driver of a GPU that need not be there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def launch(call: Call) -> None:
    """Every kernel of a unit, in training and in eval."""
    B, C, H, W = call.shape
    M, D, act = call.M, max(8, C // 8), (call.activation, 0.01)
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32

    def array(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def branch() -> Tensor:
        return torch.empty(call.shape, dtype=call.dtype, device="meta", memory_format=LAYOUTS[call.layout])

    ys, g, vectors = [branch() for _ in range(M)], branch(), [array(C)] * M
    numbers, weights, t = [array(M, C)] * 3, array(B, M, C), array(B, C)
    squeeze.branch_statistics(ys)
    for sums in (1, 3):
        squeeze.squeeze(ys, vectors, vectors, vectors, vectors, 1e-5, *act, sums)
    if call == PLAIN:
        squeeze.squeeze(ys, [None] * M, [None] * M, vectors, vectors, 1e-5, *act, 1)
    select.select(ys, *numbers, weights, *act)
    squeeze.select_backward_sums(g, ys, *numbers, *act)
    select.select_backward(g, ys, *numbers, weights, t, array(M, C), array(M, C), *act)
    squeeze.fold_backward(weights, t, H * W, weights, weights, weights, weights, array(M, C), array(M, C), B * H * W)
    fc_reduce, fc_select, d = array(D, C), array(M * C, D), array(D)
    for statistics in ((None, None), (d, d)):
        attend.attend(array(B, 1, C), H * W, fc_reduce, d, d, *statistics, 1e-5, "relu", 0.0, fc_select, None)
    attend.attend_backward(weights, weights, t, array(B, D), fc_reduce, d, d, d, d, 1e-5, True, "relu", 0.0, fc_select)


def chosen(calls: Sequence[Call], capability: int, launch: Callable[[Call], None] = launch) -> list[tuple]:
    """What the launchers would compile on such a GPU for these calls, each kernel once for every configuration; for `compiled`."""
    found: dict[str, tuple] = {}
    call = None

    def collect(function, key, signature, device, constexprs, options, attrs, warmup):
        choice = capability, call, function, signature, constexprs, attrs, options
        found.setdefault(f"{function.__name__} {signature} {constexprs} {attrs} {options}", choice)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", collect)
        patch.setattr(driver, "_active", Device(capability))
        for call in calls:
            launch(call)
    return [*found.values()]


def compiled(capability: int, call: Call, function: JITFunction, signature: dict, constexprs: dict, attrs: dict, options) -> Compiled:
    source = ASTSource(function, signature, constexprs, attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)
    registers, stack = resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    products = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)
    products = products and products[1]
    return Compiled(function.__name__, call, registers, stack, kernel.metadata.shared, accesses(ptx), products, "tf32" in ptx)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, to which it spills."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return tuple(int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", run.stdout).groups())


def accesses(ptx: str) -> Counter:
    found = re.findall(r"\b(ld|st)\.global\S*?\.(?:v(\d)\.)?b(\d+)\b", ptx)
    widths = Counter((kind, int(length or 1) * int(bits)) for kind, length, bits in found)
    # Copies to shared memory say how many bytes they are of.
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    return widths + Counter(("ld", 8 * int(size, 0)) for size in copies)


def row(kernel: Compiled) -> str:
    call = f"{str(kernel.call.dtype).removeprefix('torch.')} {kernel.call.layout} M={kernel.call.M} {kernel.call.activation} {tuple(kernel.call.shape)}"
    widths = " ".join(f"{kind}{bits}:{count}" for (kind, bits), count in sorted(kernel.accesses.items()))
    return f"{kernel.name:<40} {call:<60} {kernel.registers:>4} {kernel.stack:>6} {kernel.shared:>7}  {widths}"


TITLE = f"{'kernel':<40} {'first met in':<60} {'regs':>4} {'spills':>6} {'shared':>7}  accesses, by bits"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills(capability: int, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = [compiled(*choice) for choice in chosen(AXES if capability == 90 else USUAL, capability)]
    print(f"\nsm_{capability}", TITLE, *map(row, kernels), sep="\n")
    assert {kernel.name for kernel in kernels} >= {f"_{name}_kernel" for name in KERNELS}
    spilled = [row(kernel) for kernel in kernels if spills(kernel)]
    assert not spilled, "\n".join(spilled)
    assert not [row(kernel) for kernel in kernels if kernel.tf32]
    narrow = [row(kernel) for kernel in kernels if kernel.call in USUAL and is_narrow(kernel)]
    assert not narrow, "\n".join(narrow)


def spills(kernel: Compiled) -> bool:
    return kernel.stack > (0 if kernel.name.startswith(STREAMING) else 32)


KERNELS = [
    *(f"{step}_{layout}" for step in ("statistics", "squeeze", "select", "select_backward") for layout in LAYOUTS),
    *("statistics", "fold_backward", "attend_reduce", "attend", "attend_backward_reduce", "attend_backward"),
]


def is_narrow(kernel: Compiled) -> bool:
    """Whether a kernel that reads branches does so in less than 16 bytes: in half precision, whether it loads or stores as few."""
    if not kernel.name.endswith(("contiguous_kernel", "channels_last_kernel")):
        return False
    writes = kernel.name.startswith("_select")
    half = kernel.call.dtype.itemsize == 2 and any(bits == 16 for _, bits in kernel.accesses)
    return half or not kernel.accesses["ld", 128] or writes and not kernel.accesses["st", 128]


_choices: list[tuple] = []


def _compiled(i: int) -> Compiled:
    return compiled(*_choices[i])


def compile_all(choices: list[tuple], row: Callable[[Compiled], str], spills: Callable[[Compiled], bool], title: str) -> None:
    """The table of these, made by a process for each core; ends with an error if one of them spills."""
    _choices.extend(choices)
    print(f"{len(choices)} kernels", title, sep="\n", flush=True)
    spilled = 0
    # Forked, so that the processes have the choices, which hold functions and cannot be sent.
    with multiprocessing.get_context("fork").Pool() as pool:
        for kernel in pool.imap(_compiled, range(len(choices))):
            print(row(kernel), "  spills" if spills(kernel) else "", flush=True)
            spilled += spills(kernel)
    raise SystemExit(f"{spilled} of {len(choices)} kernels spill" if spilled else 0)


if __name__ == "__main__":
    compile_all(chosen(ALL, int(sys.argv[1])), row, spills, TITLE)
