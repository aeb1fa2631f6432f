"""The differentiable Selective Kernel unit, forward and backward: from the branches, or from the input of their convolutions.

Of branch-sized data the forward reads every branch once for each of: its batch statistics (in training), the squeeze,
the select. The backward reads them twice: one reducing pass, one writing pass. The branches y_m are all it keeps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.reference import accumulate_dtype

ACTIVATIONS = ("relu", "leaky_relu", "identity", "silu")


class BatchNorm(NamedTuple):
    """One batch-norm: what `torch.nn.functional.batch_norm` takes, with its meaning.

    Vectors are (C,), C the channels of a branch (or D, those of the attention). `weight` and `bias` may be None (1 and
    0). With `training` the batch's statistics are used, and the running ones, if there are any, move towards them by
    `momentum`; without it the running ones are used.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5

    def check(self, name: str, shape: torch.Size, device: torch.device) -> None:
        """Raises a ValueError if the vectors do not fit a batch of this shape; F.batch_norm's if it has no variance."""
        length = shape[1:2]
        for field, vector in zip(self._fields, self[:4]):
            if vector is not None and (vector.shape != length or vector.device != device):
                raise ValueError(f"{name}: expected {field} of shape {tuple(length)} on {device}, got {tuple(vector.shape)} on {vector.device}")
        missing = [field for field in ("running_mean", "running_var") if getattr(self, field) is None]
        if len(missing) == 1 or missing and not self.training:
            raise ValueError(f"{name}: expected running statistics with training={self.training}, got None for {', '.join(missing)}")
        if self.training and shape.numel() == shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Moves the running statistics towards those of a batch of `count` values (biased `var`)."""
        if self.training and self.running_mean is not None:
            for running, batch in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                running.copy_(torch.lerp(running.to(batch.dtype), batch, self.momentum))


def why_not_together(norms: Sequence[BatchNorm]) -> str | None:
    """The reason why these batch-norms of the branches cannot go through one pass, or None."""
    for norm in norms:
        if norm.training != norms[0].training or norm.eps != norms[0].eps:
            modes = ", ".join(f"training={norm.training} with eps={norm.eps}" for norm in norms)
            return f"the branches' batch-norms differ: {modes}"
    return None


def selective_kernel(
    branches: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    fc_reduce: Tensor,
    attn_norm: BatchNorm,
    fc_select: Tensor,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """The SK unit (Li et al., Selective Kernel Networks, section 3.1: fuse and select) over the branches' convolutions.

        u_m = act(BN_m(y_m))                                    split
        s   = (1/HW) Σ_m Σ_hw u_m                               squeeze, (B, C)
        a   = softmax_m(fc_select · relu(BN(fc_reduce · s)))    attend, (B, M, C)
        v   = Σ_m a_m·u_m                                       select, (B, C, H, W)

    Args:
        branches: the M ≥ 1 branches y_m, (B, C, H, W), float32, float64, bfloat16 or float16. Contiguous and
            channels_last are used as they are; the others are brought to the layout of the first.
        norms: the M branches' batch-norms, all with the same `training` and `eps`.
        fc_reduce: (D, C) or (D, C, 1, 1).
        attn_norm: the batch-norm over the D reduced channels.
        fc_select: (M·C, D) or (M·C, D, 1, 1).
        activation: act: "relu", "leaky_relu" (with `negative_slope`), "identity" or "silu".

    Returns:
        v, in the dtype and layout of the branches. The running statistics are updated once all has succeeded.

    Raises:
        ValueError: an argument has a wrong shape, device or value; or, in training, one value per channel only, as
            PyTorch's batch-norm has it.
        TypeError: the branches are not of one floating-point dtype.
    """
    _check(branches, norms, fc_reduce, fc_select, activation)
    return _unit(branches, None, branches[0].shape, norms, fc_reduce, attn_norm, fc_select, activation, negative_slope)


def convolved_selective_kernel(
    x: Tensor,
    weights: Sequence[Tensor],
    stride: int,
    dilations: Sequence[int],
    groups: int,
    norms: Sequence[BatchNorm],
    fc_reduce: Tensor,
    attn_norm: BatchNorm,
    fc_select: Tensor,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """`selective_kernel` of the convolutions y_m = w_m ∗ x_m, 3 × 3, padded by their dilation, which are the package's own.

    x_m is x, or, if x has M times the channels that a weight takes, the m-th part of its channels, read where it is. In eval
    without gradients the whole unit is one operator, and the branches do not leave the cache. `why_not_convolved` says
    which convolutions are not taken.

    Args:
        x: (B, C', H, W), contiguous or channels_last, else brought to contiguous.
        weights: M weights (C, inputs, 3, 3), with C' = groups · inputs, or M times that.
        stride: of all branches.
        dilations: one for each branch.
        groups: of all branches.
        norms, fc_reduce, attn_norm, fc_select, activation, negative_slope: as for `selective_kernel`.

    Returns:
        v, (B, C, ⌈H/stride⌉, ⌈W/stride⌉), in the layout of x; under autocast in its dtype.

    Raises:
        ValueError, TypeError: as `selective_kernel`; ValueError also for convolutions that are not taken.
    """
    dtype = _autocast_dtype(x)
    x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    reason = why_not_convolved(x, weights, stride, dilations, groups)
    if reason:
        raise ValueError(f"weights: {reason}")
    B, _, H, W = x.shape
    shape = torch.Size((B, weights[0].shape[0], (H - 1) // stride + 1, (W - 1) // stride + 1))
    _check_unit(x, shape, len(weights), norms, fc_reduce, fc_select, activation)
    convolution = stride, list(dilations), groups
    return _unit([x, *weights], convolution, shape, norms, fc_reduce, attn_norm, fc_select, activation, negative_slope)


def why_not_convolved(x: Tensor, weights: Sequence[Tensor], stride: int, dilations: Sequence[int], groups: int) -> str | None:
    """The reason why `convolved_selective_kernel` does not take these in the backend in use, or None."""
    return backends.choose([x]).why_not_convolve(x.shape, _autocast_dtype(x), [w.shape for w in weights], stride, dilations, groups)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of x before a convolution."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _unit(tensors, convolution, shape, norms, fc_reduce, attn_norm, fc_select, activation, negative_slope) -> Tensor:
    """Of branches of this shape: the `tensors`, or, with a convolution (stride, dilations, groups), made from these: x and
    the weights."""
    first = tensors[0]
    B, C, H, W = shape
    for norm in norms:
        norm.check("norms", shape, first.device)
    attn_norm.check("attn_norm", torch.Size((B, fc_reduce.shape[0], 1, 1)), first.device)
    like = {"dtype": accumulate_dtype(first.dtype), "device": first.device}
    weight = torch.stack([_vector(norm.weight, 1.0, C, like) for norm in norms])
    bias = torch.stack([_vector(norm.bias, 0.0, C, like) for norm in norms])
    statistics = None, None
    if not norms[0].training:
        statistics = (torch.stack([vector.to(**like) for vector in vectors]) for vectors in zip(*(norm[2:4] for norm in norms)))
    attn = _attention(like, fc_reduce, attn_norm, fc_select)
    v, mean, var, attn_mean, attn_var = _apply(
        _SelectiveKernel,
        backends.choose([first]),
        convolution,
        (activation, float(negative_slope)),
        norms[0].eps,
        *statistics,
        weight,
        bias,
        *attn,
        *tensors,
    )
    if norms[0].training:
        for norm, branch_mean, branch_var in zip(norms, mean, var):
            norm.update(branch_mean, branch_var, B * H * W)
    attn_norm.update(attn_mean, attn_var, B)
    return v


def attend(s: Tensor, fc_reduce: Tensor, attn_norm: BatchNorm, fc_select: Tensor) -> Tensor:
    """The attention alone: a = softmax_m(fc_select · relu(BN(fc_reduce · s))).

    Args:
        s: the pooled descriptor, (B, C).
        fc_reduce, attn_norm, fc_select: as for `selective_kernel`.

    Returns:
        a, (B, M, C), in the dtype of `s`.

    Raises:
        ValueError: a wrong shape; or, in training, one value per channel only.
        TypeError: `s` is not floating-point.
    """
    if s.dim() != 2:
        raise ValueError(f"s: expected shape (B, C), got {tuple(s.shape)}")
    _check_attention(s, s.shape[1], fc_reduce, fc_select)
    attn_norm.check("attn_norm", torch.Size((s.shape[0], fc_reduce.shape[0], 1, 1)), s.device)
    like = {"dtype": accumulate_dtype(s.dtype), "device": s.device}
    attn = _attention(like, fc_reduce, attn_norm, fc_select)
    a, mean, var = _apply(_Attend, backends.choose([s]), s.to(**like).contiguous(), *attn)
    attn_norm.update(mean, var, s.shape[0])
    return a.to(s.dtype)


def _vector(vector: Tensor | None, default: float, length: int, like: dict) -> Tensor:
    return torch.full((length,), default, **like) if vector is None else vector.to(**like)


def _attention(like: dict, fc_reduce: Tensor, norm: BatchNorm, fc_select: Tensor) -> tuple:
    """What a backend's `attend` takes beside s, in the dtype that it computes in."""
    reduce, select = (weight.flatten(1).to(**like).contiguous() for weight in (fc_reduce, fc_select))
    D = fc_reduce.shape[0]
    mean, var = (None, None) if norm.training else (norm.running_mean.to(**like), norm.running_var.to(**like))
    return reduce, _vector(norm.weight, 1.0, D, like), _vector(norm.bias, 0.0, D, like), mean, var, norm.eps, select


def _apply(function: type[torch.autograd.Function], *args):
    """function.apply, without its cost where no graph is built."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(None, *args)


class _SelectiveKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, backend, convolution, act, eps, mean, var, weight, bias, reduce, attn_weight, attn_bias, attn_mean, attn_var, attn_eps, select, *tensors
    ):
        needs_grad = ctx is not None and any(ctx.needs_input_grad)
        training, attn_training = mean is None, attn_mean is None
        layout = _layout(tensors[0])
        ys = [y.contiguous(memory_format=layout) for y in tensors[: None if convolution is None else 1]]
        if convolution is not None:
            weight_layout = _layout(tensors[1])
            operands = ys[0], [w.contiguous(memory_format=weight_layout) for w in tensors[1:]], *convolution
            if ctx is None and not training and not attn_training:
                scale = weight * torch.rsqrt(var + eps)
                attn = reduce, attn_weight, attn_bias, attn_mean, attn_var, attn_eps, select
                return backend.unit(*operands, mean, scale, bias, *attn, *act), mean, var, attn_mean, attn_var
            ys, batch_mean, batch_var = backend.branch(*operands)
            if training:
                mean, var = batch_mean, batch_var
        elif training:
            mean, var = backend.branch_statistics(ys)
        r = torch.rsqrt(var + eps)
        scale = weight * r
        # The second and third sum serve the backward.
        sums = backend.squeeze(ys, mean, scale, bias, *act, 3 if needs_grad else 1)
        s = sums[0].sum(1) / (ys[0].shape[2] * ys[0].shape[3])
        a, reduced, attn_mean, attn_var = backend.attend(s, reduce, attn_weight, attn_bias, attn_mean, attn_var, attn_eps, select)
        v = backend.select(ys, mean, scale, bias, a, *act)
        if ctx is None:
            return v, mean, var, attn_mean, attn_var
        if needs_grad:
            attn = reduce, attn_weight, attn_bias, attn_mean, attn_var, select
            inputs = () if convolution is None else (operands[0], *operands[1])
            ctx.save_for_backward(mean, r, scale, bias, sums[1:].clone(), s, a, reduced, *attn, *inputs, *ys)
            ctx.backend, ctx.convolution, ctx.act, ctx.attn_eps, ctx.M, ctx.layout = backend, convolution, act, attn_eps, len(ys), layout
            ctx.training, ctx.attn_training = training, attn_training
        ctx.mark_non_differentiable(mean, var, attn_mean, attn_var)
        ctx.set_materialize_grads(False)
        return v, mean, var, attn_mean, attn_var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        mean, r, scale, bias, K, s, a, reduced, *attn = ctx.saved_tensors[: 14]
        reduce, attn_weight, attn_bias, attn_mean, attn_var, select = attn
        inputs, ys = ctx.saved_tensors[14 : -ctx.M], list(ctx.saved_tensors[-ctx.M :])
        backend, pixels = ctx.backend, ys[0].shape[2] * ys[0].shape[3]
        g = g.contiguous(memory_format=ctx.layout)

        # The reducing pass: Σ g·u is the gradient of a.
        R = backend.squeeze(ys, mean, scale, bias, *ctx.act, 3, g)
        ds, dreduce, dattn_weight, dattn_bias, dselect = backend.attend_backward(
            R[0], a, s, reduced, reduce, attn_weight, attn_bias, attn_mean, attn_var, ctx.attn_eps, ctx.attn_training, select
        )
        t = ds / pixels
        # Σ dz and Σ dz·(y − mean) over the batch and the pixels, from dz = act'(z)·(a·g + t).
        dbias, dscale = (a * R[1:] + t[:, None] * K).sum(1)

        # The writing pass.
        dtensors = [None] * (len(ctx.needs_input_grad) - 15)
        if any(ctx.needs_input_grad[15:]):
            p = q = torch.zeros_like(scale)
            if ctx.training:
                count = ys[0].shape[0] * pixels
                p, q = scale * dbias / count, scale * r * r * dscale / count
            if ctx.convolution is None:
                dtensors = backend.select_backward(g, ys, mean, scale, bias, a, t, p, q, *ctx.act)
            else:
                x, *weights = inputs
                dx, dweights = backend.branch_backward(g, x, weights, *ctx.convolution, ys, mean, scale, bias, a, t, p, q, *ctx.act)
                dtensors = dx, *dweights
        return None, None, None, None, None, None, r * dscale, dbias, dreduce, dattn_weight, dattn_bias, None, None, None, dselect, *dtensors


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, s, reduce, weight, bias, mean, var, eps, select):
        training = mean is None
        a, reduced, mean, var = backend.attend(s, reduce, weight, bias, mean, var, eps, select)
        if ctx is None:
            return a, mean, var
        ctx.backend, ctx.eps, ctx.training = backend, eps, training
        ctx.save_for_backward(a, s, reduced, reduce, weight, bias, mean, var, select)
        ctx.mark_non_differentiable(mean, var)
        return a, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, da, *_):
        *saved, select = ctx.saved_tensors
        ds, dreduce, dweight, dbias, dselect = ctx.backend.attend_backward(da.contiguous(), *saved, ctx.eps, ctx.training, select)
        return None, ds, dreduce, dweight, dbias, None, None, None, dselect


def _layout(y: Tensor) -> torch.memory_format:
    """The layout that all branches are brought to: that of y, contiguous if it has neither."""
    if not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _check(branches: Sequence[Tensor], norms: Sequence[BatchNorm], fc_reduce: Tensor, fc_select: Tensor, activation: str) -> None:
    if not branches:
        raise ValueError("branches: expected at least one, got none")
    first = branches[0]
    if first.dim() != 4:
        raise ValueError(f"branches: expected shape (B, C, H, W), got {tuple(first.shape)}")
    for y in branches[1:]:
        if y.shape != first.shape or y.device != first.device:
            raise ValueError(
                f"branches: expected one shape and device, got {tuple(first.shape)} on {first.device} and {tuple(y.shape)} on {y.device}"
            )
        if y.dtype != first.dtype:
            raise TypeError(f"branches: expected one dtype, got {first.dtype} and {y.dtype}")
    _check_unit(first, first.shape, len(branches), norms, fc_reduce, fc_select, activation)


def _check_unit(like: Tensor, shape: torch.Size, M: int, norms: Sequence[BatchNorm], fc_reduce: Tensor, fc_select: Tensor, activation: str) -> None:
    """Of M branches of this shape, on the device of `like`."""
    if shape.numel() == 0:
        raise ValueError(f"branches: expected at least one value, got shape {tuple(shape)}")
    if len(norms) != M:
        raise ValueError(f"norms: expected one for each of the {M} branches, got {len(norms)}")
    reason = why_not_together(norms)
    if reason:
        raise ValueError(f"norms: {reason}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_attention(like, shape[1], fc_reduce, fc_select, M)


def _check_attention(like: Tensor, C: int, fc_reduce: Tensor, fc_select: Tensor, M: int | None = None) -> None:
    if not like.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {like.dtype}")
    D = fc_reduce.shape[0]
    if fc_reduce.shape not in ((D, C), (D, C, 1, 1)):
        raise ValueError(f"fc_reduce: expected shape (D, {C}) or (D, {C}, 1, 1), got {tuple(fc_reduce.shape)}")
    rows = fc_select.shape[0] if M is None else M * C
    if rows % C or fc_select.shape not in ((rows, D), (rows, D, 1, 1)):
        raise ValueError(f"fc_select: expected shape ({M or 'M'} * {C}, {D}) or the same with 1, 1, got {tuple(fc_select.shape)}")
    for name, tensor in (("fc_reduce", fc_reduce), ("fc_select", fc_select)):
        if tensor.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")
