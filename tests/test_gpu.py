"""On a GPU, for every backend that runs there: `make gpu`. Elsewhere there is nothing to test; tests/test_triton.py and
tests/test_cuda.py run the same kernels without one."""

import copy
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import sk_fused
from sk_fused.backends import BACKENDS, reference
from sk_fused.functional import ACTIVATIONS

from .parity import DTYPES, LAYOUTS, assert_parity, assert_within, batches, pair, step
from .test_convolutions import CASES, assert_matches_pytorch, operands as convolved
from .test_operators import HIDDEN, OPERATORS, PASSES, SHAPES, assert_matches_reference, flat, operands

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Every backend but the reference, forced: where there is a GPU, they are there."""
    module = BACKENDS[request.param]
    with sk_fused.use_backend(request.param):
        reason = module.why_not([torch.empty(1, 1, 1, 1, device="cuda")])
        if reason:
            pytest.fail(reason)
        yield module


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured while tests run beside is for nobody else."""
    monkeypatch.setenv("SK_FUSED_CACHE", str(tmp_path))


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    """PyTorch's float32 convolutions and products are IEEE's, and so ours; where a test does not say otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def _working_context() -> Iterator[None]:
    """After a kernel has failed the process can use the GPU no more. xdist starts another in place of one that ended."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(f"the GPU cannot be used any more: {error}", returncode=1)
        os._exit(1)


def to_gpu(value):
    """The operands of an operator, there."""
    if isinstance(value, dict):
        return {name: to_gpu(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_gpu, value))
    return value.cuda() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_operator_matches_reference(backend: ModuleType, name: str, shape: tuple, dtype: torch.dtype, layout: str):
    # Each is a kernel of its own, and compiling takes time.
    for activation in ACTIVATIONS if shape == SHAPES[0] else ACTIVATIONS[:1]:
        arguments = to_gpu(operands(shape, dtype, layout, activation)[name])
        assert_matches_reference(name, arguments, dtype, backend)
        if name == "squeeze":
            assert_matches_reference(name, (*arguments[:-1], 1), dtype, backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 256, 512, 1, 1), (3, 1024, 64, 1, 1), (2, 33, 2048, 1, 1)], ids=str)
def test_small_operators_match_reference(backend: ModuleType, shape: tuple, dtype: torch.dtype):
    for activation in HIDDEN:
        arguments = to_gpu(operands(shape, dtype, activation=activation))
        given = arguments["attend"]
        assert_matches_reference("attend", given, dtype, backend)
        assert_matches_reference("attend", (*given[:3], None, None, None, None, *given[7:-1], None), dtype, backend)
        for name in ("attend_backward", "fold_backward"):
            assert_matches_reference(name, arguments[name], dtype, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_two_runs_agree_to_the_bit(backend: ModuleType, name: str, layout: str):
    arguments = to_gpu(operands((2, 16, 128, 28, 28), torch.bfloat16, layout)[name])
    first, second = (flat(getattr(backend, name)(*arguments)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


UNITS = {
    "split": dict(in_channels=64, rd_ratio=1 / 8, rd_divisor=16),
    "stride": dict(in_channels=32, out_channels=64, stride=2, act_layer=nn.SiLU),
    "4 a group": dict(in_channels=64, groups=16, split_input=False),
    "4 a group, stride": dict(in_channels=64, groups=16, split_input=False, stride=2),
    "16 a group": dict(in_channels=64, groups=4, split_input=False),
    "depthwise": dict(in_channels=32, groups=32, split_input=False),
    "three branches": dict(in_channels=24, kernel_size=[3, 5, 7], act_layer=partial(nn.LeakyReLU, 0.1)),
}


class InTF32(nn.Conv2d):
    """Its operands are as the matrix units take them in tf32: contiguous ones without their last 13 bits, as Triton leaves them; in
    channels_last rounded, as a library may."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Of a part of the channels, too.
        half = 0 if x.stride(3) == 1 else 1 << 12
        return super()._conv_forward(in_tf32(x, half), in_tf32(weight, half), bias)


def in_tf32(x: Tensor, half: int = 0) -> Tensor:
    if x.dtype != torch.float32:
        return x
    kept = ((x.detach().view(torch.int32) + half) & -(1 << 13)).view(torch.float32)
    return x + (kept - x.detach())


@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", UNITS)
def test_unit_matches_timm(backend: ModuleType, name: str, mode: str, layout: str, tf32: bool):
    torch.backends.cudnn.allow_tf32 = tf32
    ours, theirs = (unit.cuda().train(mode == "train") for unit in pair(layout=layout, **UNITS[name]))
    if tf32:
        # cuDNN may, but need not take it where it is allowed. Theirs are run in both layouts, and the larger error counts.
        for path in theirs.paths:
            path.conv.__class__ = InTF32
    assert_parity(ours, theirs, to_gpu(batches(2, (8, UNITS[name]["in_channels"], 14, 14), layout=layout)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["split", "4 a group"])
def test_autocast(backend: ModuleType, name: str, dtype: torch.dtype):
    units = [unit.cuda() for unit in pair(layout="channels_last", **UNITS[name])]
    x = to_gpu(batches(1, (8, 64, 14, 14), layout="channels_last"))
    assert_parity(*units, x, autocast=partial(torch.autocast, "cuda", dtype=dtype))


# One after the other: their float64 oracles take gigabytes each.
large = pytest.mark.xdist_group("large")


@large
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["split", "4 a group"])
def test_large_batch(backend: ModuleType, name: str, mode: str, layout: str):
    """256 images of 56²."""
    units = [unit.cuda().train(mode == "train") for unit in pair(torch.bfloat16, layout, **UNITS[name])]
    assert_parity(*units, to_gpu(batches(1, (256, 64, 56, 56), torch.bfloat16, layout)))


@large
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, images, size", [(torch.float32, 40, 28), (torch.bfloat16, 40, 28), (torch.bfloat16, 256, 56)], ids=str)
@pytest.mark.parametrize("name", ["split", "4 a group"])
def test_eval_unit(backend: ModuleType, name: str, dtype: torch.dtype, images: int, size: int, layout: str):
    """Without gradients the unit may take another road; and more images than a ring in the L2 cache has places."""
    ours, theirs = (unit.cuda().eval() for unit in pair(dtype, layout, **UNITS[name]))
    (x,) = to_gpu(batches(1, (images, 64, size, size), dtype, layout))
    with torch.no_grad():
        v = ours(x)
        assert v.is_contiguous(memory_format=LAYOUTS[layout])
        assert_within("v", v, theirs(x), copy.deepcopy(theirs).double()(x.double()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolutions_match_pytorch(backend: ModuleType, case: str, dtype: torch.dtype, layout: str):
    for name, arguments in convolved(case, dtype, layout).items():
        assert_matches_pytorch(name, to_gpu(arguments), backend)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "ieee", "tf32"])
@pytest.mark.parametrize("case", ["dense, split, stride 2", "4 a group", "depthwise", "large maps", "true 5 × 5 and 7 × 7"])
def test_every_road_of_triton(case: str, precision: str, monkeypatch: pytest.MonkeyPatch):
    """Also those that were not measured to be the fastest."""
    from sk_fused.kernels import branch

    from .triton_branch import assert_convolutions_match, in_float64, operands, roads_of

    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    convolution, rest = to_gpu(operands(case, getattr(torch, precision, torch.float32)))
    if precision == "tf32":
        convolution = in_tf32(convolution[0]), [in_tf32(weight) for weight in convolution[1]], *convolution[2:]
    # Of one multiprocessor: its tiles are as large as they get, and a program has several.
    device = branch._device(convolution[0].device)._replace(multiprocessors=1)
    monkeypatch.setattr(branch, "_device", lambda _: device)
    assert_convolutions_match(convolution)
    theirs, exact = reference.unit(*convolution, *rest), reference.unit(*in_float64(convolution), *in_float64(rest))
    for name in roads_of(lambda: branch.unit(*convolution, *rest), monkeypatch):
        # Each into new memory, which is NaN.
        assert_within(name, roads_of(lambda: branch.unit(*convolution, *rest), monkeypatch)[name](), theirs, exact)


def launched(run) -> list[str]:
    """The names of the kernels that one call launches, after a first."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    kernels = [event.name for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")]
    assert kernels
    return kernels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches_beside_the_convolutions(backend: ModuleType, layout: str):
    """What the unit launches and its convolutions alone do not: at most 6 forward in training, and what moves the running
    statistics and counts the batch; 6 backward; 3 in eval. In float32: half precision casts its small arrays beside."""
    # Filling new memory with NaN is a launch, too.
    torch.use_deterministic_algorithms(False)
    unit = pair(layout=layout, in_channels=64)[0].cuda()
    (x,) = to_gpu(batches(1, (16, 64, 14, 14), layout=layout))
    x.requires_grad_()
    leaves, convs = [x, *unit.parameters()], [path.conv for path in unit.paths]

    def convolved() -> list[Tensor]:
        return [conv(part) for conv, part in zip(convs, x.split(32, 1))]

    convolutions = launched(convolved)
    bookkeeping = 4
    assert len(launched(lambda: unit(x))) - len(convolutions) <= 6 + bookkeeping
    outputs, v = convolved(), unit(x)
    gradients, g = [torch.ones_like(y) for y in outputs], torch.ones_like(v)
    alone = launched(lambda: torch.autograd.grad(outputs, [x, *(conv.weight for conv in convs)], gradients, retain_graph=True))
    assert len(launched(lambda: torch.autograd.grad(v, leaves, g, retain_graph=True))) - len(alone) <= 6
    with torch.no_grad():
        assert len(launched(lambda: unit.eval()(x))) - len(convolutions) <= 3


def test_cuda_graph(backend: ModuleType):
    """A training step captured and replayed gives what it gives when it is called."""
    unit = pair(layout="channels_last", **UNITS["split"])[0].cuda().eval()
    (x,) = to_gpu(batches(1, (8, 64, 14, 14), layout="channels_last"))
    expected = step(unit, x, None, torch.enable_grad())
    leaf = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(unit(leaf).sum(), leaf)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        v = unit(leaf)
        (dx,) = torch.autograd.grad(v.sum(), leaf)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(v, expected["output"], rtol=0, atol=0)
    torch.testing.assert_close(dx, expected["x.grad"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [dict(fullgraph=True), dict(fullgraph=True, mode="reduce-overhead")], ids=str)
def test_compiled(backend: ModuleType, options: dict):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    ours, theirs = (unit.cuda() for unit in pair(layout="channels_last", **UNITS["split"]))
    ours.compile(**options)
    assert_parity(ours, theirs, to_gpu(batches(3, (8, 64, 14, 14), layout="channels_last")))


def test_a_gpu_that_is_not_the_current_one(backend: ModuleType):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    ours, theirs = (unit.to("cuda:1") for unit in pair(**UNITS["split"]))
    assert_parity(ours, theirs, [x.to("cuda:1") for x in batches(1, (8, 64, 14, 14))])
