"""The functions of a backend in plain PyTorch: their specification, and what runs where no kernel can.

`branch`, `branch_backward` and `unit` are for branches that are convolved here, w_m ∗ x_m, of odd square kernels of any size, padded
by what they reach, dilation·⌊size/2⌋, x_m being x or the m-th part of its channels; the others go on from the branches.

Shapes, in every backend: `ys` are the M branches (B, C, H, W), dense and in one layout; `norm_weights`, `norm_biases` (or None),
`means` and `variances` are M vectors (C,); `mean`, `r`, `scale`, `bias`, `p`, `q` are (M, C); `a`, K1, K2, R1, R2 are (B, M, C);
`s` and `t` are (B, C); `x` is (B, C, H', W'), `weights` are M (C, inputs, size, size); `fc_reduce` is (D, C) or (D, C, 1, 1), `fc_select`
(M·C, D) or (M·C, D, 1, 1). The parameters and running statistics may have any dtype. All else but the branches, `x`, `weights`, `g`
and `v` is float32, or float64 for float64 branches. `pixels` is H·W. With z_m = (y_m − mean_m)·scale_m + bias_m, k_m = act'(z_m):

    branch_statistics     mean and variance of y_m over (B, H, W)
    branch                y_m = w_m ∗ x_m, and the same, or, without `statistics`, two empty tensors
    squeeze               the batch-norms as mean, r = 1/√(var + eps), scale = weight·r and bias; Σ_hw act(z), whose sum over the
                          second axis, (B, P, C) with any P, is that over the branches; K1 = Σ_hw k, K2 = Σ_hw k·(y − mean)
    attend                s = pooled/pixels, a = softmax_m(fc_select · act(BN(fc_reduce · s)) + select_bias)
    select                v = Σ_m a_m·act(z_m)
    unit                  all of this, with given statistics
    select_backward_sums  from g = dL/dv: da = Σ_hw g·act(z), R1 = Σ_hw g·k, R2 = Σ_hw g·k·(y − mean)
    attend_backward       from da: ds and the gradients of the parameters
    fold_backward         t = ds/pixels, and with dz = k·(a·g + t) the gradients of the batch-norms: dbias = Σ dz,
                          dweight = r·Σ dz·(y − mean); p and q, what the branches owe to their statistics
    select_backward       dy_m = scale_m·k_m·(a_m·g + t) − p_m − (y_m − mean_m)·q_m
    branch_backward       from dy_m, as select_backward gives it: dx and dw_m
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
    shape: torch.Size, dtype: torch.dtype, weights: Sequence[torch.Size], stride: int, dilations: Sequence[int], groups: int, on_cuda: bool, graph: bool
) -> str | None:
    """The reason why `branch`, `branch_backward` and `unit` do not take these convolutions, of which a graph is built or not, or None."""
    return None


def _shares(x: Tensor, weights: Sequence[Tensor], groups: int) -> Sequence[Tensor]:
    """x_m of every branch."""
    inputs = groups * weights[0].shape[1]
    return [x] * len(weights) if x.shape[1] == inputs else x.split(inputs, 1)


def layout_of(x: Tensor) -> torch.memory_format:
    """That of x; contiguous if it is neither contiguous nor channels_last."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def branch_shape(x: Tensor, weights: Sequence[Tensor], stride: int) -> tuple[int, int, int, int]:
    """(B, C, H, W) of a branch that is convolved from x."""
    B, _, H, W = x.shape
    return B, weights[0].shape[0], (H - 1) // stride + 1, (W - 1) // stride + 1


def empty_branch(x: Tensor, weights: Sequence[Tensor], stride: int) -> Tensor:
    """Memory for it, in the layout of x."""
    return torch.empty(branch_shape(x, weights, stride), dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def convolutions(x: Tensor, weights: Sequence[Tensor], stride: int, dilations: Sequence[int], groups: int) -> list[Tensor]:
    """y_m = w_m ∗ x_m, PyTorch's."""
    xs = _shares(x, weights, groups)
    return [F.conv2d(x_m, w, None, stride, d * (w.shape[2] // 2), d, groups) for x_m, w, d in zip(xs, weights, dilations, strict=True)]


def convolutions_backward(
    dys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], stride: int, dilations: Sequence[int], groups: int, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """dx, and dw of every branch, in the dtype of x; an empty tensor and an empty list for what is not in `needs`."""
    xs = _shares(x, weights, groups)
    dxs, dweights = [], []
    for dy, x_m, w, d in zip(dys, xs, weights, dilations, strict=True):
        geometry = [stride] * 2, [d * (w.shape[2] // 2)] * 2, [d] * 2, False, [0, 0], groups
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, x_m, w, None, *geometry, [*needs, False])
        dxs.append(dx)
        dweights.append(dw)
    dx = x.new_empty(0) if not needs[0] else sum(dxs[1:], dxs[0]) if xs[0] is x else torch.cat(dxs, 1)
    return dx, dweights if needs[1] else []


def _fold(weights, biases, means, variances, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = (torch.stack([vector.to(dtype) for vector in vectors]) for vectors in (means, variances))
    weight = torch.stack([torch.ones_like(mean[0]) if w is None else w.to(dtype) for w in weights])
    bias = torch.stack([torch.zeros_like(mean[0]) if b is None else b.to(dtype) for b in biases])
    r = torch.rsqrt(var + eps)
    return mean, r, r * weight, bias


def branch_statistics(ys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every branch's channels over (B, H, W)."""
    dtype = accumulate_dtype(ys[0].dtype)
    var, mean = zip(*(torch.var_mean(y.to(dtype), (0, 2, 3), correction=0) for y in ys))
    return torch.stack(mean), torch.stack(var)


def branch(x, weights, stride: int, dilations, groups: int, statistics: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    ys = convolutions(x, weights, stride, dilations, groups)
    return ys, *(branch_statistics(ys) if statistics else no_statistics(x))


def no_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """An empty mean and variance."""
    return tuple(x.new_empty(0, dtype=accumulate_dtype(x.dtype)) for _ in range(2))


def squeeze(ys, norm_weights, norm_biases, means, variances, eps: float, activation: str, negative_slope: float, sums: int):
    """mean, r, scale, bias, Σ act(z) and, with three `sums`, [K1, K2]."""
    folded = mean, _, scale, bias = _fold(norm_weights, norm_biases, means, variances, eps, accumulate_dtype(ys[0].dtype))
    pooled, *K = _pooled(ys, mean, scale, bias, activation, negative_slope, sums, mean.new_ones(ys[0].shape))
    return *folded, pooled, K


def _pooled(ys, mean, scale, bias, activation: str, negative_slope: float, sums: int, weight: Tensor) -> list[Tensor]:
    """Of the branches, weighted: the three sums, or only the first, each (B, M, C)."""
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
def attend(
    pooled, pixels: int, fc_reduce, weight, bias, mean, var, eps: float, activation: str, negative_slope: float, fc_select, select_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a, s, the reduced descriptor (B, D) before its batch-norm, and the mean and variance (D,) used: the batch's if none are given."""
    s = pooled.sum(1) / pixels
    fc_reduce, weight, bias, fc_select = _parameters(s, fc_reduce, weight, bias, fc_select)
    reduced = s @ fc_reduce.t()
    if mean is None:
        var, mean = torch.var_mean(reduced, 0, correction=0)
    else:
        mean, var = (vector.to(s.dtype, copy=True) for vector in (mean, var))
    h = activate((reduced - mean) * torch.rsqrt(var + eps) * weight + bias, activation, negative_slope)
    logits = h @ fc_select.t()
    if select_bias is not None:
        logits = logits + select_bias.to(s.dtype)
    return torch.softmax(logits.unflatten(1, (-1, s.shape[1])), 1), s, reduced, mean, var


def select(ys, mean, scale, bias, a, activation: str, negative_slope: float) -> Tensor:
    """v, in the dtype and layout of the branches."""
    normalized = _normalized(ys, mean, scale, bias)
    v = sum(_per_channel(a[:, m]) * activate(z, activation, negative_slope) for m, (_, z) in enumerate(normalized))
    return v.to(ys[0].dtype)


def unit(
    x, weights, stride: int, dilations, groups: int, norm_weights, norm_biases, means, variances, eps: float, fc_reduce, attn_weight, attn_bias,
    attn_mean, attn_var, attn_eps: float, fc_select, activation: str, negative_slope: float,
) -> Tensor:  # fmt: skip
    ys, act = convolutions(x, weights, stride, dilations, groups), (activation, negative_slope)
    mean, _, scale, bias, pooled, _ = squeeze(ys, norm_weights, norm_biases, means, variances, eps, *act, 1)
    pixels = ys[0].shape[2] * ys[0].shape[3]
    a = attend(pooled, pixels, fc_reduce, attn_weight, attn_bias, attn_mean, attn_var, attn_eps, "relu", 0.0, fc_select, None)[0]
    return select(ys, mean, scale, bias, a, *act)


def select_backward_sums(g, ys, mean, scale, bias, activation: str, negative_slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """da, R1, R2."""
    return tuple(_pooled(ys, mean, scale, bias, activation, negative_slope, 3, g.to(mean.dtype)))


@_without_autocast
def attend_backward(
    da, a, s, reduced, fc_reduce, weight, bias, mean, var, eps: float, training: bool, activation: str, negative_slope: float, fc_select
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of s, fc_reduce, weight, bias, fc_select and select_bias, in the dtype of s."""
    shapes = fc_reduce.shape, fc_select.shape
    fc_reduce, weight, bias, fc_select = _parameters(s, fc_reduce, weight, bias, fc_select)
    dlogits = (a * (da - (a * da).sum(1, keepdim=True))).flatten(1)
    r = torch.rsqrt(var + eps)
    x = (reduced - mean) * r
    n = x * weight + bias
    dn = gate(n, dlogits @ fc_select, activation, negative_slope)
    dbias, dweight = dn.sum(0), (dn * x).sum(0)
    centred = dn - dbias / s.shape[0] - x * (dweight / s.shape[0]) if training else dn
    dreduced = weight * r * centred
    dfc_select = (dlogits.t() @ activate(n, activation, negative_slope)).view(shapes[1])
    return dreduced @ fc_reduce, (dreduced.t() @ s).view(shapes[0]), dweight, dbias, dfc_select, dlogits.sum(0)


def fold_backward(a, ds, pixels: int, R1, R2, K1, K2, r, scale, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """t, dweight, dbias, p and q, of statistics over `count` values; 0: of running statistics, to which nothing is owed."""
    t = ds / pixels
    dbias, dscale = (torch.addcmul(a * R, t[:, None], K).sum(0) for R, K in ((R1, K1), (R2, K2)))
    dweight = r * dscale
    share = scale / count if count else torch.zeros_like(scale)
    return t, dweight, dbias, share * dbias, share * r * dweight


def select_backward(g, ys, mean, scale, bias, a, t, p, q, activation: str, negative_slope: float) -> list[Tensor]:
    """dy of every branch, in its dtype and layout."""
    g, dys = g.to(mean.dtype), []
    for m, (d, z) in enumerate(_normalized(ys, mean, scale, bias)):
        dz = gate(z, _per_channel(a[:, m]) * g + _per_channel(t), activation, negative_slope)
        dys.append((_per_channel(scale[m]) * dz - _per_channel(p[m]) - d * _per_channel(q[m])).to(ys[m].dtype))
    return dys


def branch_backward(
    g, x, weights, stride: int, dilations, groups: int, ys, mean, scale, bias, a, t, p, q, activation: str, negative_slope: float, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    dys = select_backward(g, ys, mean, scale, bias, a, t, p, q, activation, negative_slope)
    return convolutions_backward(dys, x, weights, stride, dilations, groups, needs)
