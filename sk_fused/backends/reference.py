"""The functions of a backend in plain PyTorch: their specification, and what runs where no kernel can.

The first three are for branches that are convolved here, w_m ∗ x_m, 3 × 3, padded by their dilation, x_m being x or the
m-th part of its channels; the others go on from the branches.

Shapes, in every backend: `ys` are the M branches (B, C, H, W), dense and in one layout; `mean`, `scale`, `bias`, `p`,
`q` are (M, C); `a` is (B, M, C); `s` and `t` are (B, C); `x` is (B, C, H', W'), `weights` are M (C, inputs, 3, 3);
`fc_reduce` is (D, C) or (D, C, 1, 1), `fc_select` (M·C, D) or (M·C, D, 1, 1). The parameters and running statistics may have
any dtype. All else but the branches, `x`, `weights`, `g` and `v` is float32, or float64 for float64 branches. With
z_m = (y_m − mean_m)·scale_m + bias_m:

    fold             mean, r = 1/√(var + eps), scale = weight·r and bias of the M batch-norms; without weight or bias 1 or 0
    branch           y_m = w_m ∗ x_m, and its mean and variance over (B, H, W)
    branch_backward  from dy_m, as select_backward gives it: dx and dw_m
    unit             v, with given statistics
    squeeze          Σ_hw g·act(z),  Σ_hw g·act'(z),  Σ_hw g·act'(z)·(y − mean)        g = 1 if it is not given
    attend           a = softmax_m(fc_select · relu(BN(fc_reduce · s)))
    select           v = Σ_m a_m·act(z_m)
    select_backward  dy_m = scale_m·act'(z_m)·(a_m·g + t) − p_m − (y_m − mean_m)·q_m
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(branches: Sequence[Tensor]) -> str | None:
    return None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a branch's sums and small arrays are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """act(z)."""
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return F.silu(z) if activation == "silu" else z


def gate(z: Tensor, value: Tensor, activation: str, negative_slope: float) -> Tensor:
    """act'(z)·value."""
    if activation == "relu":
        return torch.where(z <= 0, 0.0, value)
    if activation == "leaky_relu":
        return torch.where(z <= 0, negative_slope * value, value)
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid)) * value
    return value


def _per_channel(array: Tensor) -> Tensor:
    """(C,) or (B, C) → broadcastable to (B, C, H, W)."""
    return array[..., None, None]


def _normalized(ys: Sequence[Tensor], mean: Tensor, scale: Tensor, bias: Tensor):
    """Of every branch: y − mean and z."""
    for y, *arrays in zip(ys, mean, scale, bias, strict=True):
        branch_mean, branch_scale, branch_bias = map(_per_channel, arrays)
        d = y.to(mean.dtype) - branch_mean
        yield d, d * branch_scale + branch_bias


def why_not_convolve(
    shape: torch.Size, dtype: torch.dtype, weights: Sequence[torch.Size], stride: int, dilations: Sequence[int], groups: int
) -> str | None:
    """The reason why `branch`, `branch_backward` and `unit` do not take these convolutions, or None."""
    return None


def _shares(x: Tensor, weights: Sequence[Tensor], groups: int) -> Sequence[Tensor]:
    """x_m of every branch."""
    inputs = groups * weights[0].shape[1]
    return [x] * len(weights) if x.shape[1] == inputs else x.split(inputs, 1)


def _convolutions(x: Tensor, weights: Sequence[Tensor], stride: int, dilations: Sequence[int], groups: int) -> list[Tensor]:
    return [F.conv2d(x_m, w, None, stride, d, d, groups) for x_m, w, d in zip(_shares(x, weights, groups), weights, dilations, strict=True)]


def fold(weights, biases, means, variances, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = (torch.stack([vector.to(dtype) for vector in vectors]) for vectors in (means, variances))
    weight = torch.stack([torch.ones_like(mean[0]) if w is None else w.to(dtype) for w in weights])
    bias = torch.stack([torch.zeros_like(mean[0]) if b is None else b.to(dtype) for b in biases])
    r = torch.rsqrt(var + eps)
    return mean, r, r * weight, bias


def branch(x, weights, stride: int, dilations, groups: int) -> tuple[list[Tensor], Tensor, Tensor]:
    ys = _convolutions(x, weights, stride, dilations, groups)
    return ys, *branch_statistics(ys)


def branch_backward(g, x, weights, stride: int, dilations, groups: int, ys, mean, scale, bias, a, t, p, q, activation: str, negative_slope: float):
    """dx, and dw of every branch, in the dtype of x."""
    dys = select_backward(g, ys, mean, scale, bias, a, t, p, q, activation, negative_slope)
    xs = _shares(x, weights, groups)
    dxs, dweights = [], []
    for dy, x_m, w, d in zip(dys, xs, weights, dilations, strict=True):
        geometry = [stride] * 2, [d] * 2, [d] * 2, False, [0, 0], groups
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, x_m, w, None, *geometry, [True, True, False])
        dxs.append(dx)
        dweights.append(dw)
    return sum(dxs) if xs[0] is x else torch.cat(dxs, 1), dweights


def unit(
    x, weights, stride: int, dilations, groups: int, mean, scale, bias, fc_reduce, attn_weight, attn_bias, attn_mean, attn_var,
    attn_eps: float, fc_select, activation: str, negative_slope: float,
) -> Tensor:  # fmt: skip
    ys = _convolutions(x, weights, stride, dilations, groups)
    s = squeeze(ys, mean, scale, bias, activation, negative_slope, 1)[0].sum(1) / (ys[0].shape[2] * ys[0].shape[3])
    a = attend(s, fc_reduce, attn_weight, attn_bias, attn_mean, attn_var, attn_eps, fc_select)[0]
    return select(ys, mean, scale, bias, a, activation, negative_slope)


def branch_statistics(ys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every branch's channels over (B, H, W)."""
    dtype = accumulate_dtype(ys[0].dtype)
    var, mean = zip(*(torch.var_mean(y.to(dtype), (0, 2, 3), correction=0) for y in ys))
    return torch.stack(mean), torch.stack(var)


def squeeze(ys, mean, scale, bias, activation: str, negative_slope: float, sums: int, g: Tensor | None = None) -> list[Tensor]:
    """The three sums, or only the first, each (B, M, C)."""
    weight = mean.new_ones(ys[0].shape) if g is None else g.to(mean.dtype)
    pooled = []
    for d, z in _normalized(ys, mean, scale, bias):
        terms = [weight * activate(z, activation, negative_slope)]
        if sums == 3:
            k = gate(z, weight, activation, negative_slope)
            terms += k, k * d
        pooled.append([term.sum((2, 3)) for term in terms])
    return [torch.stack(branches, 1) for branches in zip(*pooled)]


def _without_autocast(function: Callable) -> Callable:
    """Autocast would take the matrix products to half precision."""

    @functools.wraps(function)
    def run(*args):
        device = args[0].device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def _parameters(s: Tensor, fc_reduce: Tensor, weight: Tensor | None, bias: Tensor | None, fc_select: Tensor) -> tuple[Tensor, ...]:
    """As they are computed with: (D, C), (D,), (D,) and (M·C, D), in the dtype of s."""
    D = fc_reduce.shape[0]
    weight = s.new_ones(D) if weight is None else weight.to(s.dtype)
    bias = s.new_zeros(D) if bias is None else bias.to(s.dtype)
    return fc_reduce.flatten(1).to(s.dtype), weight, bias, fc_select.flatten(1).to(s.dtype)


@_without_autocast
def attend(s, fc_reduce, weight, bias, mean, var, eps: float, fc_select) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, the reduced descriptor (B, D) before its batch-norm, and the mean and variance (D,) used: the batch's if none are given."""
    fc_reduce, weight, bias, fc_select = _parameters(s, fc_reduce, weight, bias, fc_select)
    reduced = s @ fc_reduce.t()
    if mean is None:
        var, mean = torch.var_mean(reduced, 0, correction=0)
    else:
        mean, var = (vector.to(s.dtype, copy=True) for vector in (mean, var))
    h = F.relu((reduced - mean) * torch.rsqrt(var + eps) * weight + bias)
    a = torch.softmax((h @ fc_select.t()).unflatten(1, (-1, s.shape[1])), 1)
    return a, reduced, mean, var


@_without_autocast
def attend_backward(da, a, s, reduced, fc_reduce, weight, bias, mean, var, eps: float, training: bool, fc_select):
    """The gradients of s, fc_reduce, weight, bias and fc_select, in the dtype of s."""
    shapes = fc_reduce.shape, fc_select.shape
    fc_reduce, weight, bias, fc_select = _parameters(s, fc_reduce, weight, bias, fc_select)
    dlogits = (a * (da - (a * da).sum(1, keepdim=True))).flatten(1)
    r = torch.rsqrt(var + eps)
    x = (reduced - mean) * r
    n = x * weight + bias
    dn = torch.where(n <= 0, 0.0, dlogits @ fc_select)
    dbias, dweight = dn.sum(0), (dn * x).sum(0)
    centred = dn - dbias / s.shape[0] - x * (dweight / s.shape[0]) if training else dn
    dreduced = weight * r * centred
    return dreduced @ fc_reduce, (dreduced.t() @ s).view(shapes[0]), dweight, dbias, (dlogits.t() @ F.relu(n)).view(shapes[1])


def select(ys, mean, scale, bias, a, activation: str, negative_slope: float) -> Tensor:
    """v, in the dtype and layout of the branches."""
    normalized = _normalized(ys, mean, scale, bias)
    v = sum(_per_channel(a[:, m]) * activate(z, activation, negative_slope) for m, (_, z) in enumerate(normalized))
    return v.to(ys[0].dtype)


def select_backward(g, ys, mean, scale, bias, a, t, p, q, activation: str, negative_slope: float) -> list[Tensor]:
    """dy of every branch, in its dtype and layout."""
    g, dys = g.to(mean.dtype), []
    for m, (d, z) in enumerate(_normalized(ys, mean, scale, bias)):
        dz = gate(z, _per_channel(a[:, m]) * g + _per_channel(t), activation, negative_slope)
        dys.append((_per_channel(scale[m]) * dz - _per_channel(p[m]) - d * _per_channel(q[m])).to(ys[m].dtype))
    return dys
