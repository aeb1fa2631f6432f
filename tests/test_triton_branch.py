"""The Triton convolutions of the branches: their tests, which need Triton's interpreter, in a process that has it; which road is taken;
and what the kernels compile to, for GPUs that are not there; for one architecture and all that changes a kernel:

    python -m tests.test_triton_branch 90
"""

import itertools
import sys
import time
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver

from sk_fused.backends import triton
from sk_fused.functional import ACTIVATIONS
from sk_fused.kernels import attend, branch, select, squeeze

from .parity import LAYOUTS
from .test_operators import run_python
from .test_triton_compile import Compiled, chosen, compile_all, compiled
from .triton_branch import CASES, operands


def test_under_the_interpreter():
    run = run_python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/triton_branch.py", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout and "failed" not in run.stdout and "skipped" not in run.stdout


def test_precision_is_pytorchs_for_convolutions():
    """In a process of its own: the older and the newer of PyTorch's settings do not go together."""
    lines = (
        "import torch; from sk_fused.kernels.branch import _precision",
        "print(_precision(torch.float32), _precision(torch.bfloat16))",
        "torch.backends.cudnn.allow_tf32 = False; print(_precision(torch.float32), _precision(torch.float16))",
        "torch.backends.cudnn.allow_tf32 = True; print(_precision(torch.float32))",
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'; print(_precision(torch.float32))",
    )
    run = run_python("-c", "\n".join(lines))
    assert run.stdout.split() == ["tf32", "half", "ieee", "half", "tf32", "ieee"], run.stderr


def test_what_is_not_taken_is_said():
    shape, weights = torch.Size((2, 64, 14, 14)), [torch.Size((64, 64, 3, 3))] * 2
    for change, says in (
        ({"dtype": torch.float64}, "float64"),
        ({"weights": weights * 5}, "10"),
        ({"weights": [weights[0], torch.Size((64, 32, 3, 3))]}, "32, 3, 3"),
        ({"weights": [torch.Size((64, 64, 4, 4))] * 2}, "4, 4"),
        ({"weights": [torch.Size((64, 64, 3, 5))] * 2}, "3, 5"),
        ({"weights": [torch.Size((64, 48, 3, 3))] * 2}, "64 channels"),
        ({"groups": 5}, "5 groups"),
        ({"shape": torch.Size((1, 64, 4096, 4096))}, "4096, 4096"),
    ):
        arguments = {"shape": shape, "dtype": torch.bfloat16, "weights": weights, "stride": 1, "dilations": [1, 2], "groups": 1, **change}
        assert says in triton.why_not_convolve(**arguments, on_cuda=True, graph=False)
    for inputs, C, groups, _, stride, dilations, kernels in CASES.values():
        for share in (inputs // groups, inputs // groups // len(kernels)):
            taken = [torch.Size((C, share, k, k)) for k in kernels]
            x = torch.Size((2, share * groups * (1 if share == inputs // groups else len(kernels)), 14, 14))
            assert triton.why_not_convolve(x, torch.float32, taken, stride, dilations, groups, True, False) is None


def test_case_of_a_call_tells_what_changes_the_times(monkeypatch: pytest.MonkeyPatch):
    """And nothing else: sizes of images and batches only by powers of two."""
    # Whatever a benchmark before has set.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def case(name: str = "4 a group", B: int = 2, H: int = 7, layout: str = "channels_last", dtype: torch.dtype = torch.float32) -> str:
        (x, *convolution), _ = operands(name, dtype, layout)
        x = torch.empty(B, x.shape[1], H, 6, dtype=dtype).to(memory_format=LAYOUTS[layout])
        return branch._case("unit", x, *convolution)

    assert case() == case(H=8) == "unit, float32 tf32, channels_last: 40 to 40, 4 a group, kernels 3/1 3/2, stride 1, 2 images of 64"
    assert case(B=5) == case(B=8) and case(B=4) != case(B=5)
    distinct = [case(), case(H=20), case(B=4), case(layout="contiguous"), case(dtype=torch.float16), *map(case, CASES)]
    assert len(set(distinct)) == len(distinct) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_road_is_the_librarys_where_nothing_is_measured(layout: str, monkeypatch: pytest.MonkeyPatch):
    offered = {}

    def choose(case: str, roads, default: str, device: str | None) -> str:
        offered[case.partition(",")[0]] = {*roads}, default
        return default

    monkeypatch.setattr(branch.choice, "choose", choose)
    for library in ("_branch_library", "_unit_library"):
        monkeypatch.setattr(branch, library, lambda *_: None)
    convolution, rest = operands("4 a group", layout=layout)
    for statistics in (True, False):
        branch.branch(*convolution, statistics)
    branch.unit(*convolution, *rest)
    own = {"own"} if layout == "channels_last" else set()
    twice = {"own twice"} if layout == "channels_last" else set()
    branches = {"library"} | own, "library"
    assert offered == {"branch": branches, "branch without statistics": branches, "unit": ({"library"} | own | twice, "library")}


class Call(NamedTuple):
    """Convolutions, by what the launchers look at: channels in and out and groups, images of 14 × 14."""

    channels: tuple[int, int, int]
    precision: str = "half"
    images: int = 256
    kernel: int = 3
    stride: int = 1
    # Of the branches, one for each.
    dilations: tuple[int, ...] = (1, 2)
    split: bool = False
    activation: str = "relu"
    half: torch.dtype = torch.bfloat16

    @property
    def dtype(self) -> torch.dtype:
        return self.half if self.precision == "half" else torch.float32


# What has tiles of its own: widths of groups, in and out; batches that fill a GPU and that do not; precisions.
SHALLOW, DENSE, WIDE, NARROW, DEPTHWISE = (32, 64, 1), (64, 64, 1), (256, 256, 1), (128, 128, 32), (64, 64, 64)
CALLS = [
    *(Call(channels, images=images) for channels in (SHALLOW, DENSE, WIDE, NARROW, DEPTHWISE) for images in (256, 1)),
    *(Call(*call) for call in ((WIDE, "tf32"), (NARROW, "tf32"), (NARROW, "ieee"))),
]
# In every precision: all widths, also those that fill no tile; and what else changes a kernel, along each axis.
WIDTHS = [SHALLOW, DENSE, WIDE, NARROW, DEPTHWISE, *((C, C, 1) for C in (16, 24, 32, 48, 96, 128, 512)), (3, 64, 1), (64, 128, 1), (20, 40, 4), (7, 7, 7)]
WIDTHS += [(32 * C, 32 * C, 32) for C in (2, 8, 16, 32, 64)]
PRECISIONS = [("half", torch.bfloat16), ("half", torch.float16), ("tf32", torch.float32), ("ieee", torch.float32)]
AXES = [
    *(dict(images=images) for images in (256, 1)),
    *(dict(kernel=kernel) for kernel in (5, 7)),
    dict(stride=2),
    *(dict(dilations=dilations) for dilations in ((1,), (1, 1), (1, 2, 3), (1, 2, 3, 4))),
    dict(split=True),
    *(dict(activation=activation) for activation in ACTIVATIONS),
]
ALL = [
    Call(channels, precision, half=half, **axis)
    for (precision, half), channels, axis in itertools.product(PRECISIONS, WIDTHS, AXES)
    if axis.keys() == {"images"} or channels in (DENSE, WIDE, NARROW, DEPTHWISE)
]


def device(_: torch.device) -> branch._Device:
    """The one that is compiled for."""
    return branch._Device("a GPU", 132, driver.active.get_current_target().arch == 90)


def launch(call: Call) -> None:
    """The package's own roads, on tensors without memory."""
    inputs, C, groups = call.channels
    M, parts = len(call.dilations), len(call.dilations) if call.split else 1
    x = torch.empty(call.images, parts * inputs, 14, 14, dtype=call.dtype, device="meta").to(memory_format=torch.channels_last)
    vectors = (x.new_empty(C, dtype=torch.float32),) * M
    weights = [x.new_empty(C, inputs // groups, call.kernel, call.kernel) for _ in range(M)]
    convolution = weights, call.stride, list(call.dilations), groups
    unit = vectors, vectors, vectors, vectors, 1e-5, None, None, None, None, None, 1e-5, None, call.activation, 0.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "_device", device)
        patch.setattr(branch, "_precision", lambda dtype: call.precision)
        # Their kernels have their own test.
        patch.setattr(branch, "attend", lambda pooled, *_: [pooled.new_empty(pooled.shape[0], M, pooled.shape[2])])
        patch.setattr(branch, "select", lambda *_: None)
        roads = {}
        patch.setattr(branch, "_take", lambda operator, convolution, ways: roads.update({f"{operator}, {way}": ways[way] for way in ways}))
        branch.branch(x, *convolution)
        branch.unit(x, *convolution, *unit)
        for road in ("branch, own", "unit, own", "unit, own twice"):
            roads[road]()


def row(kernel: Compiled) -> str:
    numbers = f"{kernel.registers:>4} {kernel.stack:>6} {kernel.shared:>7}"
    return f"{kernel.name:<24} {_described(kernel.call):<80} {numbers}  {kernel.products or ''}"


def _described(call: Call) -> str:
    """Without what is as usual."""
    unusual = [f"{name}={value}" for name, value in call._asdict().items() if name != "channels" and value != Call._field_defaults[name]]
    return " ".join([str(call.channels), *unusual])


TITLE = f"{'kernel':<24} {'first met in':<80} regs spills  shared  products"


def spills(kernel: Compiled) -> bool:
    """More than a few registers, in an epilogue."""
    return kernel.stack > 32


@pytest.mark.parametrize(("capability", "products"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")])
def test_compiles_to_the_instructions_meant_and_hardly_spills(capability: int, products: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = [compiled(*choice) for choice in chosen(CALLS, capability, launch)]
    print(f"\nsm_{capability}", TITLE, *map(row, kernels), sep="\n")
    assert {kernel.name for kernel in kernels} == {"_branch_kernel", "_moments_kernel", "_branch_squeeze_kernel", "_branch_select_kernel"}
    for kernel in kernels:
        assert not spills(kernel), kernel
        has_products = kernel.name != "_moments_kernel" and kernel.call.channels != DEPTHWISE and kernel.call.precision != "ieee"
        assert kernel.products == (products if has_products else None), kernel


def first_calls(training: bool) -> None:
    """All that the first call of a new class of shapes launches, a unit of skresnext50's, on tensors without memory: every road, as they
    are measured, and what comes with them. In training the backward too."""
    B, C, M, groups, D = 256, 128, 2, 32, 32
    x = torch.empty(B, C, 56, 56, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    convolution = x, [x.new_empty(C, C // groups, 3, 3) for _ in range(M)], 1, [1, 2], groups
    vectors, d, act = [x.new_empty(C, dtype=torch.float32)] * M, x.new_empty(D, dtype=torch.float32), ("relu", 0.0)
    fc_reduce, fc_select = d.new_empty(D, C), d.new_empty(M * C, D)
    roads = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "_device", device)
        patch.setattr(branch, "_take", lambda operator, convolution, ways: roads.update(ways))
        if not training:
            branch.unit(*convolution, *[vectors] * 4, 1e-5, fc_reduce, d, d, d, d, 1e-5, fc_select, *act)
        else:
            branch.branch(*convolution)
        outputs = [road() for road in roads.values()]
    if not training:
        return
    ys, *moments = outputs[0]
    mean, r, scale, bias, pooled, K = squeeze.squeeze(ys, vectors, vectors, vectors, vectors, 1e-5, *act, 3)
    a, s, reduced, *used = attend.attend(pooled, 56 * 56, fc_reduce, d, d, None, None, 1e-5, *act, fc_select, None)
    v = select.select(ys, mean, scale, bias, a, *act)
    da, R1, R2 = squeeze.select_backward_sums(v, ys, mean, scale, bias, *act)
    ds, *_ = attend.attend_backward(da, a, s, reduced, fc_reduce, d, d, *used, 1e-5, True, *act, fc_select)
    t, _, _, p, q = squeeze.fold_backward(a, ds, 56 * 56, R1, R2, *K, r, scale, B * 56 * 56)
    select.select_backward(v, ys, mean, scale, bias, a, t, p, q, *act)


@pytest.mark.parametrize(("training", "most"), [(False, 6), (True, 13)], ids=["eval", "training"])
def test_first_call_takes_seconds(training: bool, most: int, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """By what it compiles, one kernel after the other; the time is printed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    choices = chosen([training], 90, first_calls)
    start = time.perf_counter()
    for choice in choices:
        compiled(*choice)
    seconds = time.perf_counter() - start
    print(f"\n{len(choices)} kernels compiled in {seconds:.1f} s:", *sorted(choice[2].__name__ for choice in choices))
    assert 0 < len(choices) <= most
    assert seconds < 60


if __name__ == "__main__":
    compile_all(chosen(ALL, int(sys.argv[1]), launch), row, spills, TITLE)
