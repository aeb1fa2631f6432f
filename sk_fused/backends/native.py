"""The C++ extension: csrc/library.cpp lists the operators, csrc/cpu has the kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import accumulate_dtype

try:
    from sk_fused import _C
except ImportError as error:
    _C = None
    _missing = f"the native extension is not there: {error}"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not(branches: Sequence[Tensor]) -> str | None:
    """The reason why these branches cannot be taken, or None."""
    if _C is None:
        return _missing
    if branches[0].device.type != "cpu":
        return f"the native kernels run on a CPU, the branches are on {branches[0].device}"
    if branches[0].dtype not in DTYPES:
        return f"the native kernels take float32, float64, bfloat16 and float16, the branches are {branches[0].dtype}"
    return None


if _C is not None:
    branch_statistics = torch.ops.sk_fused.branch_statistics.default
    squeeze = torch.ops.sk_fused.squeeze.default
    attend = torch.ops.sk_fused.attend.default
    attend_backward = torch.ops.sk_fused.attend_backward.default
    select = torch.ops.sk_fused.select.default
    select_backward = torch.ops.sk_fused.select_backward.default

    @torch.library.register_fake("sk_fused::branch_statistics")
    def _(ys):
        shape, dtype = (len(ys), ys[0].shape[1]), accumulate_dtype(ys[0].dtype)
        return ys[0].new_empty(shape, dtype=dtype), ys[0].new_empty(shape, dtype=dtype)

    @torch.library.register_fake("sk_fused::squeeze")
    def _(ys, mean, scale, bias, activation, negative_slope, sums, g=None):
        return mean.new_empty((sums, ys[0].shape[0], *mean.shape))

    @torch.library.register_fake("sk_fused::attend")
    def _(s, fc_reduce, weight, bias, mean, var, eps, fc_select):
        (B, C), D = s.shape, fc_reduce.shape[0]
        return s.new_empty((B, fc_select.shape[0] // C, C)), s.new_empty((B, D)), s.new_empty((D,)), s.new_empty((D,))

    @torch.library.register_fake("sk_fused::attend_backward")
    def _(da, a, s, reduced, fc_reduce, weight, bias, mean, var, eps, training, fc_select):
        return tuple(x.new_empty(x.shape) for x in (s, fc_reduce, weight, bias, fc_select))

    @torch.library.register_fake("sk_fused::select")
    def _(ys, mean, scale, bias, a, activation, negative_slope):
        return torch.empty_like(ys[0])

    @torch.library.register_fake("sk_fused::select_backward")
    def _(g, ys, mean, scale, bias, a, t, p, q, activation, negative_slope):
        return [torch.empty_like(y) for y in ys]
