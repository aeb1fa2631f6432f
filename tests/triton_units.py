"""Units on the Triton backend, against timm. tests/test_triton.py runs this file, with TRITON_INTERPRET=1."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from triton.runtime.interpreter import GridExecutor

import sk_fused
from benchmarks import cases, harness, passes
from sk_fused.backends import triton as backend

from .parity import DTYPES, LAYOUTS, assert_parity, assert_within, batches, freeze, pair, step


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """The backend is forced; the launches of its kernels, by name, are counted."""
    counted, call = Counter(), GridExecutor.__call__

    def count(executor, *args, **kwargs):
        counted[executor.fn.__name__] += 1
        call(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    with sk_fused.use_backend("triton"):
        yield counted


UNITS = {
    "split": (dict(in_channels=16), (3, 16, 7, 7)),
    "SiLU, stride, whole input": (dict(in_channels=8, split_input=False, stride=2, act_layer=nn.SiLU), (4, 8, 7, 5)),
    "three branches, leaky ReLU": (dict(in_channels=12, kernel_size=[3, 5, 7], act_layer=partial(nn.LeakyReLU, 0.1)), (4, 12, 4, 4)),
    "one branch": (dict(in_channels=8, kernel_size=[3]), (3, 8, 3, 3)),
    "5 × 5, groups": (dict(in_channels=8, groups=4, keep_3x3=False, split_input=False), (4, 8, 5, 5)),
    "one pixel": (dict(in_channels=8), (4, 8, 1, 1)),
    "not affine": (dict(in_channels=8, norm_layer=partial(nn.BatchNorm2d, affine=False)), (3, 8, 3, 5)),
}


MODES = [(name, mode) for name in UNITS for mode in ("train", "eval")] + [("split", "branches frozen"), ("split", "attention frozen")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "mode"), MODES)
def test_unit_matches_timm(name: str, mode: str, layout: str, launches: Counter):
    """Output, gradients and buffers, of two training steps or of one with given statistics."""
    arguments, shape = UNITS[name]
    units = pair(layout=layout, **arguments)
    for unit in units:
        unit.train(mode != "eval")
        if "frozen" in mode:
            freeze(unit, "paths" if mode == "branches frozen" else "attn")
    assert_parity(*units, batches(2 if mode == "train" else 1, shape, layout=layout))
    assert launches["_attend_kernel"] and launches["_attend_backward_kernel"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_dtype(dtype: torch.dtype, layout: str):
    assert_parity(*pair(dtype, layout, in_channels=16), batches(1, (3, 16, 5, 5), dtype, layout))


def test_autocast():
    assert_parity(*pair(in_channels=16), batches(1, (3, 16, 5, 5)), autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16))


def test_inference():
    ours, theirs = (unit.eval() for unit in pair(in_channels=16))
    (x,) = batches(1, (3, 16, 7, 7))
    with torch.no_grad():
        assert_within("output", ours(x), theirs(x), theirs.double()(x.double()))


def test_attention_alone():
    ours, theirs = (unit.attn for unit in pair(in_channels=16))
    us = torch.randn(3, 2, 16, 4, 4)
    exact = copy.deepcopy(theirs).double()
    assert_within("a", ours(us), theirs(us), exact(us.double()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_agree_to_the_bit(layout: str):
    unit, _ = pair(layout=layout, in_channels=16)
    (x,) = batches(1, (3, 16, 7, 7), layout=layout)
    state = copy.deepcopy(unit.state_dict())
    first = step(unit, x, None, nullcontext())
    unit.load_state_dict(state)
    second = step(unit, x, None, nullcontext())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches(layout: str, launches: Counter):
    """Beside the convolutions, those of one unit: at most 6 forward and 6 backward in training, 3 in eval."""
    unit, _ = pair(layout=layout, in_channels=16)
    (x,) = batches(1, (3, 16, 7, 7), layout=layout)
    v = unit(x.requires_grad_())
    assert 0 < sum(launches.values()) <= 6, launches
    launches.clear()
    v.sum().backward()
    assert 0 < sum(launches.values()) <= 6, launches
    launches.clear()
    with torch.no_grad():
        unit.eval()(x)
    assert 0 < sum(launches.values()) <= 3, launches


def compiled(unit: nn.Module, **options) -> nn.Module:
    torch._dynamo.reset()
    # The compiler does not know the filling of empty memory.
    torch.use_deterministic_algorithms(False)
    unit.compile(fullgraph=True, **options)
    return unit


@pytest.mark.parametrize(("mode", "layout", "compiler"), [("train", "channels_last", "inductor"), ("train", "contiguous", "aot_eager"), ("eval", "channels_last", "aot_eager")])
def test_compiled_as_one_graph(mode: str, layout: str, compiler: str, launches: Counter):
    ours, theirs = (unit.train(mode == "train") for unit in pair(layout=layout, in_channels=16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(compiled(ours, backend=compiler), theirs, batches(2 if mode == "train" else 1, (3, 16, 5, 5), layout=layout))
    assert launches["_attend_kernel"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_once_for_batches_of_any_size(layout: str):
    ours, theirs = (unit.eval() for unit in pair(layout=layout, in_channels=16))
    compiled(ours, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for x in (torch.randn(B, 16, 5, 5).to(memory_format=LAYOUTS[layout]) for B in (3, 2, 5)):
            assert_within("output", ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()))


def test_more_branches_than_the_kernels_take():
    unit = sk_fused.FusedSelectiveKernel(18, kernel_size=[3] * 9)
    with pytest.raises(RuntimeError, match="'triton' was forced, but the Triton kernels take at most 8 branches, got 9"):
        unit(torch.randn(2, 18, 4, 4))


def test_eight_branches():
    arguments = dict(in_channels=16, kernel_size=[3] * 8)
    assert_parity(*pair(**arguments), batches(1, (2, 16, 4, 4)))


def test_passes_measures_every_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a GPU does with it, but for the speed: no operator fails its check, and each has a time."""
    monkeypatch.setattr(backend, "why_not", lambda ys: None)
    monkeypatch.setitem(passes.UNITS, "small", cases.Case(dict(in_channels=16, groups=4, split_input=False), 9))
    monkeypatch.setattr(harness, "ceilings", lambda *_: {"copy_GBps": 1.0, "matrix_GFLOPs": 1.0})
    benchmark = passes.BENCHMARK._replace(options=lambda parser: parser.set_defaults(units=["small"]))
    result = json.loads(harness.command(benchmark, ["--batch", "2", "--seconds", "0", "--results", str(tmp_path)]).read_text())
    timed = {row["pass"] for row in result["rows"] if row["backends"].get("sk_fused:triton", {}).get("median_ms", 0) > 0}
    assert timed == passes.PASSES.keys() - {"convolutions"}
