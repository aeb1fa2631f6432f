"""The operators of the Triton backend against their specification. tests/test_triton.py runs this file, with TRITON_INTERPRET=1."""

from collections.abc import Callable

import numpy
import pytest
import torch
import triton
from triton.runtime import interpreter

import sk_fused
from sk_fused.backends import reference
from sk_fused.backends import triton as backend
from sk_fused.functional import ACTIVATIONS
from sk_fused.kernels import select, squeeze

from .parity import DTYPES, LAYOUTS
from .test_operators import HIDDEN, OPERATORS, PASSES, assert_matches_reference, exact_statistics, flat, operands

# M, B, C, H, W: rows that are whole 16-byte vectors and rows that are not; more than a tile of pixels, and more than a block of
# channels; one pixel, one channel; a tensor that no vector divides.
SHAPES = [(2, 2, 8, 4, 4), (2, 2, 16, 7, 7), (3, 1, 17, 1, 1), (1, 2, 1, 3, 3), (2, 1, 2, 67, 64), (4, 1, 72, 3, 5)]

# Every shape in float32; in the other dtypes, which cut memory otherwise, those of whole vectors and of rows that cross them.
CASES = [(shape, torch.float32) for shape in SHAPES] + [(shape, dtype) for shape in SHAPES[:2] for dtype in DTYPES[1:]]

# Where the activations are all held: crossing rows, and lanes without a channel.
CROSSING = 2, 1, 24, 3, 3


@pytest.fixture(autouse=True)
def _forced():
    assert triton.knobs.runtime.interpret
    with sk_fused.use_backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_operator_matches_reference(name: str, shape: tuple, dtype: torch.dtype, layout: str):
    arguments = operands(shape, dtype, layout)[name]
    assert_matches_reference(name, arguments, dtype, backend)
    if name == "squeeze":
        assert_matches_reference(name, (*arguments[:-1], 1), dtype, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", PASSES[1:])
def test_activation_matches_reference(name: str, activation: str, dtype: torch.dtype, layout: str):
    assert_matches_reference(name, operands(CROSSING, dtype, layout, activation)[name], dtype, backend)


# With more than a block of images, and more than one of channels, of reduced ones and of branches.
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 9), (3, 1, 12, 1, 1), (2, 17, 100, 2, 2), (5, 17, 16, 1, 2)], ids=str)
def test_small_operators_match_reference(shape: tuple, dtype: torch.dtype):
    for activation in HIDDEN if shape[1] < 10 else ("relu",):
        arguments = operands(shape, dtype, activation=activation)
        given = arguments["attend"]
        assert_matches_reference("attend", given, dtype, backend)
        assert_matches_reference("attend", (*given[:3], None, None, None, None, *given[7:-1], None), dtype, backend)
        for training in (True, False):
            *before, _, activation, negative_slope, fc_select = arguments["attend_backward"]
            assert_matches_reference("attend_backward", (*before, training, activation, negative_slope, fc_select), dtype, backend)
    for count in (arguments["fold_backward"][-1], 0):
        assert_matches_reference("fold_backward", (*arguments["fold_backward"][:-1], count), dtype, backend)


def test_parameters_in_half_precision_and_as_convolutions():
    arguments = operands((2, 3, 20, 3, 3), torch.float32)
    ys, weights, biases, means, variances, *rest = arguments["squeeze"]
    halves = [[None if vector is None else vector.bfloat16() for vector in vectors] for vectors in (weights, biases, means, variances)]
    rounded = [[None if vector is None else vector.float() for vector in vectors] for vectors in halves]
    for ours, exact in zip(flat(backend.squeeze(ys, *halves, *rest)), flat(backend.squeeze(ys, *rounded, *rest)), strict=True):
        assert torch.equal(ours, exact)
    pooled, pixels, fc_reduce, weight, bias, mean, var, *act, fc_select, select_bias = arguments["attend"]
    halves = [tensor.bfloat16() for tensor in (fc_reduce[..., None, None], weight, bias, mean, var, fc_select[..., None, None], select_bias)]
    rounded = [tensor.float() for tensor in halves]
    ours, exact = (backend.attend(pooled, pixels, *given[:5], *act, *given[5:]) for given in (halves, rounded))
    for o, e in zip(ours, exact, strict=True):
        assert torch.equal(o, e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 4, 10, 15, 15), (2, 2, 8, 40, 40)], ids=str)
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_variance_where_the_mean_is_far_larger(shape: tuple, layout: str, mean: float):
    """float32 against float64 of the same values, the first of which is an outlier."""
    M, B, C, H, W = shape
    ys = [(mean + torch.randn(B, C, H, W)).to(memory_format=LAYOUTS[layout]) for _ in range(M)]
    for y in ys:
        y[0, :, 0, 0] -= 30
    ours, exact = backend.branch_statistics(ys), exact_statistics(ys)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2 * eps, atol=0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=8 * eps, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_two_runs_agree_to_the_bit(name: str, layout: str):
    arguments = operands((2, 2, 8, 5, 7), torch.float32, layout)[name]
    for first, second in zip(flat(getattr(backend, name)(*arguments)), flat(getattr(backend, name)(*arguments)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["squeeze", "select", "select_backward_sums", "select_backward"])
def test_nan_and_infinity_as_the_reference(name: str, layout: str):
    """Of each only in its own row: rows are read with values of their neighbours."""
    for activation in ACTIVATIONS[:3]:
        arguments = operands((2, 2, 16, 3, 3), torch.float32, layout, activation)[name]
        ys = arguments[int(name.startswith("select_backward"))]
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
            ys[0][0, 4 * i, 2, 2] = value
        ours, exact = (flat(getattr(module, name)(*arguments)) for module in (backend, reference))
        if name == "squeeze":
            ours[4], exact[4] = ours[4].sum(1), exact[4].sum(1)
        for o, e in zip(ours, exact, strict=True):
            torch.testing.assert_close(o, e, equal_nan=True)


def test_statistics_of_a_channel_with_nan_or_infinity_are_not_finite():
    for value in (float("nan"), float("inf")):
        for layout in LAYOUTS:
            (ys,) = operands((1, 2, 8, 5, 7), torch.float32, layout)["branch_statistics"]
            ys[0][1, 1, 2, 3] = value
            mean, var = backend.branch_statistics(ys)
            assert mean.isfinite().tolist() == var.isfinite().tolist() == [[True, False, *[True] * 6]]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_softmax_and_silu_where_exp_saturates(dtype: torch.dtype):
    arguments = operands((2, 2, 5, 1, 1), dtype, activation="silu")
    *before, fc_select, select_bias = arguments["attend"]
    assert_matches_reference("attend", (*before, 1e4 * fc_select, select_bias), dtype, backend)
    ys, mean, scale, bias, *rest = arguments["select"]
    assert_matches_reference("select", (ys, mean, 1e4 * scale, bias, *rest), dtype, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, layout: str):
    torch.library.opcheck(getattr(backend, name), operands((2, 1, 4, 3, 3), torch.float32, layout)[name])


def test_opcheck_of_every_form_of_the_optional_arguments():
    arguments = operands((2, 1, 4, 3, 3), torch.float32)
    torch.library.opcheck(backend.squeeze, (*arguments["squeeze"][:-1], 1))
    given = arguments["attend"]
    torch.library.opcheck(backend.attend, (*given[:3], None, None, None, None, *given[7:-1], None))


class Addresses:
    """Runs the last program of a kernel on tensors that it is told are huge: no memory is read or written, the addresses that it
    asks for are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], program: Callable[[dict], int]):
        self.loads, self.stores, self.arguments = [], [], {}
        call, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder

        def last(executor, *args, **kwargs):
            self.arguments = {**dict(zip(executor.arg_names, args)), **kwargs}
            assert sizes.keys() <= self.arguments.keys()
            self.arguments.update(sizes)
            executor.grid = (1,)
            index = program(self.arguments)
            assert index < 2**31
            monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", (index, 0, 0)))
            call(executor, **self.arguments)

        def load(pointers, mask, *_):
            self.loads.append((pointers.get_element_ty(), pointers.data[mask.data]))
            return interpreter.TensorHandle(numpy.zeros(pointers.data.shape, interpreter._get_np_dtype(pointers.get_element_ty())), pointers.get_element_ty())

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", last)
        monkeypatch.setattr(builder, "create_masked_load", load)
        monkeypatch.setattr(builder, "create_masked_store", lambda pointers, value, mask, *_: self.stores.append((pointers.get_element_ty(), pointers.data[mask.data])))

    @staticmethod
    def assert_end(accesses: list, operand: torch.Tensor, size: int) -> None:
        """Those of the branches' dtype go up to the last of `size` values of the operand, and none is far from it."""
        dtype = {torch.bfloat16: triton.language.bfloat16, torch.float32: triton.language.float32}[operand.dtype]
        offsets = numpy.concatenate([addresses.astype(numpy.int64) for element, addresses in accesses if element == dtype]) - operand.data_ptr()
        assert offsets.max() == (size - 1) * operand.element_size()
        assert offsets.min() > (size - 2**20) * operand.element_size()


# 2^22 images of 16 channels and 7 × 7 pixels: 3.3 · 10^9 values.
IMAGES, CHANNELS, PIXELS = 2**22, 16, 49
VALUES = IMAGES * CHANNELS * PIXELS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["select", "select_backward", "select_backward_sums", "squeeze"])
def test_offsets_beyond_32_bits(name: str, layout: str, monkeypatch: pytest.MonkeyPatch):
    arguments = list(operands((1, 2, CHANNELS, 7, 7), torch.bfloat16, layout)[name])
    if name.startswith("select_backward"):
        arguments[1] = [arguments[0]]
    y = arguments[0] if name.startswith("select_backward") else arguments[0][0]
    sums = name in ("squeeze", "select_backward_sums")
    if layout == "channels_last":
        last = Addresses(monkeypatch, {}, lambda a: IMAGES * -(-CHANNELS // a["CHANNELS"]) - 1)
    elif sums:
        last = Addresses(monkeypatch, {"B": IMAGES}, lambda a: -(-IMAGES * CHANNELS // a["ROWS"]) - 1)
    else:
        last = Addresses(monkeypatch, {"B": IMAGES, "vectors": VALUES // 8}, lambda a: -(-VALUES // 8 // a["VECTORS"]) - 1)
    getattr({"select": select, "select_backward": select}.get(name, squeeze), name)(*arguments)
    last.assert_end(last.loads, y, VALUES)
    if sums:
        last.assert_end(last.stores[-1:], last.arguments["outputs"][-1], IMAGES * CHANNELS)
    else:
        last.assert_end(last.stores, last.arguments["v"] if name == "select" else last.arguments["dys"][0], VALUES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_statistics_of_parts_of_many_tiles(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch):
    """Those of small tensors are of one otherwise."""
    monkeypatch.setattr(squeeze, "_MOST_PARTS", 16)
    for shape in ((2, 3, 16, 16, 32), (2, 5, 40, 31, 29)):
        assert_matches_reference("branch_statistics", operands(shape, dtype, layout)["branch_statistics"], dtype, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_of_statistics_beyond_32_bits(layout: str, monkeypatch: pytest.MonkeyPatch):
    (ys,) = operands((1, 2, CHANNELS, 7, 7), torch.bfloat16, layout)["branch_statistics"]
    if layout == "channels_last":
        sizes = {"pixels": IMAGES * PIXELS, "part_pixels": 2 * PIXELS}
        last = Addresses(monkeypatch, sizes, lambda a: IMAGES // 2 * -(-CHANNELS // a["CHANNELS"]) - 1)
    else:
        last = Addresses(monkeypatch, {"B": IMAGES, "part_images": 2}, lambda a: IMAGES // 2 * -(-CHANNELS // a["ROWS"]) - 1)
    # The second stage is not of interest.
    monkeypatch.setattr(squeeze, "_statistics_kernel", {(4,): lambda *_, **__: None})
    squeeze.branch_statistics(ys)
    last.assert_end(last.loads, ys[0], VALUES)
