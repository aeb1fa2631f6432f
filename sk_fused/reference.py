"""The Selective Kernel unit in plain PyTorch, to be read beside the paper (Li et al., Selective Kernel Networks, section
3.1) and to check the kernels against: the same signatures as `sk_fused.functional`, differentiated by autograd, in any
dtype and on any device. The branches' convolutions are the caller's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.reference import activate
from .functional import BatchNorm


def normalize(x: Tensor, norm: BatchNorm) -> Tensor:
    """BN(x), of this process alone, whatever the `group`; moves the running statistics."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


def squeeze(us: Sequence[Tensor]) -> Tensor:
    """s = (1/HW) Σ_m Σ_hw u_m, (B, C): the sum of the branches, then global average pooling."""
    return sum(us).mean((2, 3))


def attend(
    s: Tensor,
    fc_reduce: Tensor,
    attn_norm: BatchNorm,
    fc_select: Tensor,
    attn_activation: str = "relu",
    attn_negative_slope: float = 0.01,
    select_bias: Tensor | None = None,
) -> Tensor:
    """a = softmax_m(fc_select · relu(BN(fc_reduce · s))), (B, M, C): how much of each branch every channel takes."""
    n = normalize(F.linear(s, fc_reduce.flatten(1))[..., None, None], attn_norm).flatten(1)
    h = activate(n, attn_activation, attn_negative_slope)
    return F.linear(h, fc_select.flatten(1), select_bias).unflatten(1, (-1, s.shape[1])).softmax(1)


def select(us: Sequence[Tensor], a: Tensor) -> Tensor:
    """v = Σ_m a_m·u_m, (B, C, H, W)."""
    return sum(u * weight[..., None, None] for u, weight in zip(us, a.unbind(1), strict=True))


def selective_kernel(
    branches: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    fc_reduce: Tensor,
    attn_norm: BatchNorm,
    fc_select: Tensor,
    activation: str = "relu",
    negative_slope: float = 0.01,
    attn_activation: str = "relu",
    attn_negative_slope: float = 0.01,
    select_bias: Tensor | None = None,
) -> Tensor:
    """`functional.selective_kernel`, step by step."""
    us = [activate(normalize(y, norm), activation, negative_slope) for y, norm in zip(branches, norms, strict=True)]
    a = attend(squeeze(us), fc_reduce, attn_norm, fc_select, attn_activation, attn_negative_slope, select_bias)
    return select(us, a)
