"""The Triton kernels of sk_fused/kernels, for a GPU. With TRITON_INTERPRET=1 in the environment they run on a CPU, slowly, where
this backend is forced.

Triton is imported by the first call that needs it.
"""

import functools
import importlib
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import sk_fused.backends as backends

from . import fake
from .fake import constant
from .reference import layout_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Those of convolutions.
CONVOLVED = (torch.float32, torch.bfloat16, torch.float16)

# The kernels unroll the branches, and keep sums of all of them in registers.
MOST_BRANCHES = 8

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(branches: Sequence[Tensor]) -> str | None:
    """The reason why these branches cannot be taken, or None."""
    y = branches[0]
    if y.device.type != "cuda" and not (y.device.type == "cpu" and _INTERPRETED and backends._forced == "triton"):
        return f"the Triton kernels run on a GPU, the branches are on {y.device}"
    if y.dtype not in DTYPES:
        return f"the Triton kernels take float32, float64, bfloat16 and float16, the branches are {y.dtype}"
    if len(branches) > MOST_BRANCHES:
        return f"the Triton kernels take at most {MOST_BRANCHES} branches, got {len(branches)}"
    if y.shape[0] == 0:
        return "the Triton kernels take at least one image, the batch is empty"
    return _why_not_triton() or (_why_not_device(y.device) if y.device.type == "cuda" else None)


@constant
def _why_not_triton() -> str | None:
    return _why_not_import()


@constant
def _why_not_device(device: torch.device) -> str | None:
    if torch.version.hip:
        return f"the Triton kernels are for NVIDIA GPUs, this build of PyTorch is for ROCm {torch.version.hip}"
    major, minor = _capability(device)
    return None if major >= 8 else f"the Triton kernels are for compute capability 8.0 and up, {device} has {major}.{minor}"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _why_not_import() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton is not there: {error}"
    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 6):
        return f"the Triton kernels need triton 3.6 or later, {triton.__version__} is installed"
    return None


def why_not_convolve(
    shape: torch.Size, dtype: torch.dtype, weights: Sequence[torch.Size], stride: int, dilations: Sequence[int], groups: int, on_cuda: bool, graph: bool
) -> str | None:
    """The reason why convolutions of an x of this shape and dtype are left to PyTorch, or None. `branch` and `unit` may well
    take the library's themselves: see sk_fused/kernels/choice.py."""
    M, (C, inputs, *_) = len(weights), weights[0]
    if dtype not in CONVOLVED:
        return f"the Triton convolutions take float32, bfloat16 and float16, got {dtype}"
    if M > MOST_BRANCHES:
        return f"the Triton convolutions have at most {MOST_BRANCHES} branches, got {M}"
    uneven = any(tuple(weight) != (C, inputs, weight[2], weight[2]) or weight[2] % 2 == 0 for weight in weights)
    if uneven or C % groups or shape[1] not in (groups * inputs, M * groups * inputs):
        return (
            "the Triton convolutions have odd square kernels, with the same channels in all branches, which are those of x or of its parts, "
            f"got weights {[tuple(weight) for weight in weights]} in {groups} groups for {shape[1]} channels"
        )
    if shape[2] * shape[3] * max(shape[1], C) >= 1 << 30:
        return f"the Triton convolutions take images and branches of less than 2³⁰ values, got {tuple(shape[1:])} to {C} channels"
    return None


@functools.cache
def _kernel(file: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"sk_fused.kernels.{file}"), name)


def _launcher(file: str, name: str) -> Callable:
    def launch(*arguments):
        operand = arguments[0]
        # Triton launches on the current device.
        with torch.cuda.device_of(operand if isinstance(operand, Tensor) else operand[0]):
            return _kernel(file, name)(*arguments)

    return launch


# Operators, not torch.library.triton_op: to the compiler they are as opaque as the native ones, so there is one graph, and a call
# costs the host less than half of what it does through torch.library.custom_op.
_library = torch.library.Library("sk_fused_triton", "DEF")


def _operator(file: str, fake_impl: Callable, schema: str) -> Callable:
    """The operator of this schema, which is that of csrc/library.cpp: the function of its name in sk_fused/kernels/`file`.py."""
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key in ("CUDA", "CPU") if _INTERPRETED else ("CUDA",):
        _library.impl(name, _launcher(file, name), key)
    torch.library.register_fake(f"sk_fused_triton::{name}", fake_impl, lib=_library)
    return getattr(torch.ops.sk_fused_triton, name).default


branch_statistics = _operator("squeeze", fake.branch_statistics, "branch_statistics(Tensor[] ys) -> (Tensor mean, Tensor var)")
branch = _operator(
    "branch", fake.branch,
    "branch(Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, bool statistics=True)"
    " -> (Tensor[] ys, Tensor mean, Tensor var)",
)  # fmt: skip
squeeze = _operator(
    "squeeze", fake.squeeze(lambda ys, sums: _kernel("squeeze", "pooled_parts")(ys, sums)),
    "squeeze(Tensor[] ys, Tensor?[] norm_weights, Tensor?[] norm_biases, Tensor[] means, Tensor[] variances, float eps, str activation,"
    " float negative_slope, int sums) -> (Tensor mean, Tensor r, Tensor scale, Tensor bias, Tensor pooled, Tensor[] K)",
)  # fmt: skip
attend = _operator(
    "attend", fake.attend,
    "attend(Tensor pooled, SymInt pixels, Tensor fc_reduce, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, str activation,"
    " float negative_slope, Tensor fc_select, Tensor? select_bias) -> (Tensor a, Tensor s, Tensor reduced, Tensor mean, Tensor var)",
)  # fmt: skip
select = _operator(
    "select", fake.select,
    "select(Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, Tensor a, str activation, float negative_slope) -> Tensor",
)  # fmt: skip
unit = _operator(
    "branch", fake.unit,
    "unit(Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, Tensor?[] norm_weights, Tensor?[] norm_biases, Tensor[] means,"
    " Tensor[] variances, float eps, Tensor fc_reduce, Tensor? attn_weight, Tensor? attn_bias, Tensor attn_mean, Tensor attn_var,"
    " float attn_eps, Tensor fc_select, str activation, float negative_slope) -> Tensor",
)  # fmt: skip
select_backward_sums = _operator(
    "squeeze", fake.select_backward_sums,
    "select_backward_sums(Tensor g, Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, str activation, float negative_slope)"
    " -> (Tensor da, Tensor R1, Tensor R2)",
)  # fmt: skip
attend_backward = _operator(
    "attend", fake.attend_backward,
    "attend_backward(Tensor da, Tensor a, Tensor s, Tensor reduced, Tensor fc_reduce, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor var, float eps, bool training, str activation, float negative_slope, Tensor fc_select)"
    " -> (Tensor ds, Tensor dfc_reduce, Tensor dweight, Tensor dbias, Tensor dfc_select, Tensor dselect_bias)",
)  # fmt: skip
fold_backward = _operator(
    "squeeze", fake.fold_backward,
    "fold_backward(Tensor a, Tensor ds, SymInt pixels, Tensor R1, Tensor R2, Tensor K1, Tensor K2, Tensor r, Tensor scale, SymInt count)"
    " -> (Tensor t, Tensor dweight, Tensor dbias, Tensor p, Tensor q)",
)  # fmt: skip
select_backward = _operator(
    "select", fake.select_backward,
    "select_backward(Tensor g, Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, Tensor a, Tensor t, Tensor p, Tensor q,"
    " str activation, float negative_slope) -> Tensor[]",
)  # fmt: skip
branch_backward = _operator(
    "branch", fake.branch_backward(layout_of),
    "branch_backward(Tensor g, Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, Tensor[] ys, Tensor mean, Tensor scale,"
    " Tensor bias, Tensor a, Tensor t, Tensor p, Tensor q, str activation, float negative_slope, bool[2] needs)"
    " -> (Tensor dx, Tensor[] dweights)",
)  # fmt: skip
