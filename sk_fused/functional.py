"""The differentiable Selective Kernel unit, forward and backward: from the branches, or from the input of their convolutions.

Of branch-sized data the forward reads every branch once for each of: its batch statistics (in training), the squeeze,
the select. The backward reads them twice: one reducing pass, one writing pass. The branches y_m are all it keeps. Why that
is enough: docs/maths.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import backends, synchronize
from .backends import native, reference
from .backends.reference import accumulate_dtype, branch_shape, layout_of

if TYPE_CHECKING:
    # A build of PyTorch may be without it.
    from torch.distributed import ProcessGroup

ACTIVATIONS = ("relu", "leaky_relu", "identity", "silu")
# Of the attention, between its two products.
ATTN_ACTIVATIONS = ("relu", "leaky_relu", "identity")


class BatchNorm(NamedTuple):
    """One batch-norm: what `torch.nn.functional.batch_norm` takes, with its meaning. `BatchNorm.of` makes it of a layer.

    Vectors are (C,), C the channels of a branch (or D, those of the attention), of any floating-point dtype. `weight` and `bias`
    may be None (1 and 0). With `training` the batch's statistics are used, and the running ones, if there are any, move towards
    them in place by `momentum`, a number or a tensor of one; without it the running ones are used, and have to be there. With a
    `group` of processes, the batch is that of all of them together, as in `torch.nn.SyncBatchNorm`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, module: nn.Module) -> BatchNorm:
        """What the next forward of a batch-norm layer does, by the layer's own rules; to be asked at every forward.

        Weight, bias and running statistics, (C,) or None, are the layer's own tensors: gradients reach the first two, and the others
        are moved. Its mode, `eps` and `momentum` are read as they stand; `momentum=None` is the mean over all batches, which
        `count_batches` counts. In training without `track_running_stats` nothing is moved; in eval without running statistics the
        batch's are used. `group` is that of a SyncBatchNorm in training, None for one process alone. The layer is not called: its
        hooks do not run, and what a subclass does beside the norm (timm's BatchNormAct2d: an activation) is left to the caller.

        Args:
            module: a BatchNorm1d, 2d or 3d, a SyncBatchNorm, or a subclass; or a frozen one, as timm and torchvision have them: a class
                called Frozen…, with `weight`, `bias`, `running_mean`, `running_var` and `eps`.

        Raises:
            TypeError: `module` is something else.
        """
        if type(module).__name__.startswith("Frozen"):
            return cls(module.weight, module.bias, module.running_mean, module.running_var, training=False, eps=module.eps)
        if not isinstance(module, _BatchNorm):
            raise TypeError(f"module: expected BatchNorm1d, 2d or 3d, SyncBatchNorm or a frozen one, got {type(module).__name__}")
        buffers, training = module._buffers, module.training
        mean, var = buffers["running_mean"], buffers["running_var"]
        momentum = module.momentum
        if momentum is None:
            # A tensor, so that torch.compile need not know its value.
            momentum = 1.0 / (module.num_batches_tracked + 1).double() if _counts(module) else 0.0
        uses_batch = training or mean is None
        if training and not module.track_running_stats:
            mean = var = None
        group = _group(module) if training and isinstance(module, nn.SyncBatchNorm) else None
        return cls(parameter(module, "weight"), parameter(module, "bias"), mean, var, uses_batch, momentum, module.eps, group)

    def check(self, name: str, shape: Sequence[int], device: torch.device) -> None:
        """Raises a ValueError if the vectors do not fit a batch of this shape; F.batch_norm's if it has no variance."""
        length = shape[1:2]
        for vector in self[:4]:
            if vector is not None and (vector.shape != length or vector.device != device):
                field = next(field for field, value in zip(self._fields, self) if value is vector)
                raise ValueError(f"{name}: expected {field} of shape {tuple(length)} on {device}, got {tuple(vector.shape)} on {vector.device}")
        if (self.running_mean is None) != (self.running_var is None) or self.running_mean is None and not self.training:
            missing = [field for field in ("running_mean", "running_var") if getattr(self, field) is None]
            raise ValueError(f"{name}: expected running statistics with training={self.training}, got None for {', '.join(missing)}")
        if self.training and self.group is None and shape[0] == 1 and all(size == 1 for size in shape[2:]):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


def without_norm(channels: int, like: Tensor, bias: Tensor | None = None) -> BatchNorm:
    """A batch-norm that changes nothing, but for adding a `bias`: for branches, or an attention, that have no norm.

    Args:
        channels: C of the branches, or D of the attention.
        like: a branch: its device is taken, and the dtype that its sums have.
        bias: (channels,), that of the layer before, where it was called without; or None.
    """
    mean = like.new_zeros(channels, dtype=accumulate_dtype(like.dtype))
    return BatchNorm(None, bias, mean, torch.ones_like(mean), training=False, eps=0.0)


def count_batches(*modules: nn.Module) -> None:
    """Adds one to `num_batches_tracked` of the layers that count, as their own forward would: those in training that track running
    statistics. To be called after the unit that was given `BatchNorm.of` them: a batch that it refuses is not counted. Where activation
    checkpointing runs a forward again, nothing is."""
    counts = [module._buffers["num_batches_tracked"] for module in modules if _counts(module)]
    if counts and not recomputes():
        if backends.only_pytorch():
            # As _move_running_statistics.
            for count in counts:
                count.add_(1)
        else:
            torch._foreach_add_(counts, 1)


def _counts(module: nn.Module) -> bool:
    """Whether a batch-norm layer counts the batches of its next forward."""
    return module.training and getattr(module, "track_running_stats", False) and module._buffers.get("num_batches_tracked") is not None


def _group(norm: nn.SyncBatchNorm) -> ProcessGroup | None:
    """The processes that share its statistics, if there is more than this one."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """module.name, quickly; what is pruned, sharded, or a replica's of nn.DataParallel is no Parameter."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def recomputes() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing, which has moved the running statistics before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _move_running_statistics(moments: Sequence[tuple[BatchNorm, Tensor, Tensor]]) -> None:
    """Towards the mean and the unbiased variance of a batch, of every batch-norm that has running statistics."""
    running, batch, momentums = [], [], []
    for norm, mean, var in moments:
        if norm.running_mean is not None:
            running += norm.running_mean, norm.running_var
            batch += mean, var
            momentums += norm.momentum, norm.momentum
    if not running or recomputes():
        return
    with torch.no_grad():
        if backends.only_pytorch():
            # torch.func has no rule for what changes several tensors at once.
            for vector, moment, momentum in zip(running, batch, momentums):
                vector.copy_(vector + momentum * (moment - vector))
            return
        moved = [_cast(vector, target.dtype) for vector, target in zip(running, batch)]
        torch._foreach_lerp_(moved, batch, _factors(momentums, batch))
        for vector, result in zip(running, moved):
            if vector is not result:
                vector.copy_(result)


def _unbiased(batches: Sequence[tuple[Tensor, Tensor, int | Tensor]]) -> list[Tensor]:
    """mean and unbiased variance of every batch, from its mean, its biased variance and its count."""
    return [moment for mean, var, count in batches for moment in (mean, var * (count / (count - 1)))]


def _factors(factors: list[float | Tensor], vectors: Sequence[Tensor]) -> list[float] | list[Tensor]:
    """As PyTorch's _foreach functions take them: numbers alone or tensors alone."""
    if not any(isinstance(factor, Tensor) for factor in factors):
        return factors
    return [torch.as_tensor(factor, dtype=vector.dtype, device=vector.device) for factor, vector in zip(factors, vectors)]


def why_not_together(norms: Sequence[BatchNorm]) -> str | None:
    """The reason why these batch-norms of the branches cannot go through one pass, or None."""
    for norm in norms[1:]:
        if (norm.training, norm.eps, norm.group) != (norms[0].training, norms[0].eps, norms[0].group):
            modes = ", ".join(f"training={norm.training} with eps={norm.eps}{'' if norm.group is None else ', synchronised'}" for norm in norms)
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
    attn_activation: str = "relu",
    attn_negative_slope: float = 0.01,
    select_bias: Tensor | None = None,
) -> Tensor:
    """The SK unit (Li et al., Selective Kernel Networks, section 3.1: fuse and select) over the branches' convolutions.

        u_m = act(BN_m(y_m))                                    split
        s   = (1/HW) Σ_m Σ_hw u_m                               squeeze, (B, C)
        a   = softmax_m(fc_select · relu(BN(fc_reduce · s)))    attend, (B, M, C)
        v   = Σ_m a_m·u_m                                       select, (B, C, H, W)

    Other families have the same core. What they have no batch-norm for, takes `without_norm`, with the bias of fc_reduce if it
    has one; instead of ReLU there may be another activation; and fc_select may have a bias.

    Args:
        branches: the M ≥ 1 branches y_m, (B, C, H, W), float32, float64, bfloat16 or float16. Contiguous and
            channels_last are used as they are; the others are brought to the layout of the first.
        norms: the M branches' batch-norms, all with the same `training`, `eps` and `group`.
        fc_reduce: (D, C) or (D, C, 1, 1).
        attn_norm: the batch-norm over the D reduced channels.
        fc_select: (M·C, D) or (M·C, D, 1, 1).
        activation: act: "relu", "leaky_relu" (with `negative_slope`), "identity" or "silu".
        attn_activation: in the attention: "relu", "leaky_relu" (with `attn_negative_slope`) or "identity".
        select_bias: (M·C,), added to fc_select's product; or None.

    Parameters may have another floating-point dtype than the branches.

    Returns:
        v, in the dtype and layout of the branches. The running statistics are updated once all has succeeded.

    Raises:
        ValueError: an argument has a wrong shape, device or value; or, in training, one value per channel only, as
            PyTorch's batch-norm has it.
        TypeError: the branches are not of one floating-point dtype; or one tensor, or one BatchNorm, is given for a list of them.
        RuntimeError: a backend is forced (`use_backend`) that cannot take the branches.
    """
    _check(branches, norms, fc_reduce, fc_select, activation)
    acts = (activation, float(negative_slope)), (attn_activation, float(attn_negative_slope))
    return _unit(backends.choose(branches), branches, None, branches[0].shape, norms, fc_reduce, attn_norm, fc_select, select_bias, *acts)


def convolved(x, weights, stride, dilations, groups, norms, fc_reduce, attn_norm, fc_select, activation, negative_slope) -> Tensor | None:
    """`selective_kernel` of the convolutions y_m = w_m ∗ x_m, padded by dilation·⌊size/2⌋, which are the package's own; or None where the
    backend in use does not take these. `FusedSelectiveKernel` calls it.

    x_m is x, or, if x has M times the channels that a weight takes, the m-th part of its channels, read where it is. In eval,
    where no graph is built, the whole unit is one operator, and the branches do not leave the cache.

    Args:
        x: (B, C', H, W), contiguous or channels_last, else brought to contiguous.
        weights: M weights (C, inputs, size, size), of odd sizes, with C' = groups · inputs, or M times that.
        stride: of all branches.
        dilations: one for each branch.
        groups: of all branches.
        norms, fc_reduce, attn_norm, fc_select, activation, negative_slope: as for `selective_kernel`.

    Returns:
        v, (B, C, ⌈H/stride⌉, ⌈W/stride⌉), in the layout of x; under autocast in its dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `selective_kernel`.
    """
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C', H, W), got {tuple(x.shape)}")
    if not weights or len(dilations) != len(weights) or any(weight.dim() != 4 for weight in weights):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights: expected one (C, inputs, size, size) for each of the dilations {list(dilations)}, got {shapes}")
    _check_norms(norms, len(weights))
    backend, dtype = backends.choose([x]), _autocast_dtype(x)
    graph = _builds_graph(x, *weights, fc_reduce, fc_select, *(vector for norm in (*norms, attn_norm) for vector in norm[:2]))
    if backend.why_not_convolve(x.shape, dtype, [w.shape for w in weights], stride, dilations, groups, x.is_cuda, graph):
        return None
    x, weights = _cast(x, dtype), [_cast(weight, dtype) for weight in weights]
    shape = branch_shape(x, weights, stride)
    _check_unit(x, shape, len(weights), norms, fc_reduce, fc_select, activation)
    convolution, act = (stride, list(dilations), groups), (activation, float(negative_slope))
    return _unit(backend, [x, *weights], convolution, shape, norms, fc_reduce, attn_norm, fc_select, None, act, _RELU)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), which takes longer to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of x before a convolution."""
    # A device's `type` takes longer to make than all else that is asked here.
    if not torch._C._is_any_autocast_enabled():
        return x.dtype
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


# An activation, with its negative slope.
_RELU = "relu", 0.0


def _unit(backend, tensors, convolution, shape, norms, fc_reduce, attn_norm, fc_select, select_bias, act, attn_act) -> Tensor:
    """Of branches of this shape: the `tensors`, or, with a convolution (stride, dilations, groups), made from these: x and
    the weights."""
    _check_attn_act(attn_act, select_bias, fc_select, tensors[0])
    device = tensors[0].device
    for norm in norms:
        norm.check("norms", shape, device)
    attn_norm.check("attn_norm", (shape[0], fc_reduce.shape[0], 1, 1), device)
    call = convolution, act, attn_act, tuple(norms), attn_norm
    leaves = (
        fc_reduce,
        attn_norm.weight,
        attn_norm.bias,
        fc_select,
        select_bias,
        *(norm.weight for norm in norms),
        *(norm.bias for norm in norms),
        *tensors,
    )
    if backend is native and not torch.compiler.is_compiling() and norms[0].group is None and attn_norm.group is None:
        differentiable = functools.partial(_differentiable, _SelectiveKernel, call, [*norms, attn_norm]) if torch.is_grad_enabled() else None
        v, *moments = native.selective_kernel(differentiable, *call, *leaves)
    else:
        v, *moments = _apply(_SelectiveKernel, backend, *call, *leaves)
    moved = [*zip(norms, moments[0].unbind(), moments[1].unbind())] if norms[0].training else []
    if attn_norm.training:
        moved.append((attn_norm, *moments[-2:]))
    _move_running_statistics(moved)
    return v


def attend(
    s: Tensor,
    fc_reduce: Tensor,
    attn_norm: BatchNorm,
    fc_select: Tensor,
    attn_activation: str = "relu",
    attn_negative_slope: float = 0.01,
    select_bias: Tensor | None = None,
) -> Tensor:
    """The attention alone: a = softmax_m(fc_select · relu(BN(fc_reduce · s))).

    Args:
        s: the pooled descriptor, (B, C).
        fc_reduce, attn_norm, fc_select, attn_activation, attn_negative_slope, select_bias: as for `selective_kernel`; M is how many
            times C rows fc_select has.

    Returns:
        a, (B, M, C), in the dtype of `s`. The running statistics are updated once all has succeeded.

    Raises:
        ValueError: an argument has a wrong shape, device or value; or, in training, fewer than two images, of all processes of a `group`.
        TypeError: `s` is not floating-point.
        RuntimeError: a backend is forced (`use_backend`) that cannot take `s`.
    """
    if s.dim() != 2:
        raise ValueError(f"s: expected shape (B, C), got {tuple(s.shape)}")
    # Of a batch over several processes, this one's part may be empty.
    if attn_norm.training and attn_norm.group is None and s.shape[0] == 0:
        raise ValueError(f"s: expected at least one image in training, got shape {tuple(s.shape)}")
    _check_attention("s", s, s.shape[1], fc_reduce, fc_select)
    attn_norm.check("attn_norm", (s.shape[0], fc_reduce.shape[0], 1, 1), s.device)
    attn_act = attn_activation, float(attn_negative_slope)
    _check_attn_act(attn_act, select_bias, fc_select, s)
    pooled = s[:, None].to(accumulate_dtype(s.dtype)).contiguous()
    leaves = pooled, fc_reduce, attn_norm.weight, attn_norm.bias, fc_select, select_bias
    a, *moments = _apply(_Attend, backends.choose([s]), attn_act, attn_norm, *leaves)
    if attn_norm.training:
        _move_running_statistics([(attn_norm, *moments)])
    return a.to(s.dtype)


def _builds_graph(*leaves: object) -> bool:
    """Whether autograd is to have a graph of what is made of these, among which there may be others than tensors."""
    return torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def _apply(function: type[torch.autograd.Function], backend: ModuleType, *args):
    """function.apply; its forward alone where no graph is built, or where the graph is PyTorch's own."""
    if _builds_graph(*args) and not backends.only_pytorch():
        return function.apply(backend, *args)
    return function.forward(None, backend, *args)


def _attend(backend: ModuleType, act: tuple[str, float], norm: BatchNorm, pooled: Tensor, pixels: int, fc_reduce, weight, bias, fc_select, select_bias):
    """a, s, the reduced descriptor, the mean and variance used and of how many images they are."""
    mean, var, images = None, None, pooled.shape[0]
    if not norm.training:
        mean, var = norm.running_mean, norm.running_var
    elif norm.group is not None:
        *_, mean, var = backend.attend(pooled, pixels, fc_reduce, weight, bias, None, None, norm.eps, *act, fc_select, select_bias)
        mean, var, images = synchronize.joined_moments(mean, var, images, norm.group)
    return *backend.attend(pooled, pixels, fc_reduce, weight, bias, mean, var, norm.eps, *act, fc_select, select_bias), images


def _attend_backward(backend: ModuleType, act, norm: BatchNorm, da, a, s, reduced, mean, var, images, fc_reduce, weight, bias, fc_select):
    """The gradients of s, fc_reduce, weight, bias, fc_select and select_bias."""
    alone = norm.training and norm.group is None
    gradients = backend.attend_backward(da, a, s, reduced, fc_reduce, weight, bias, mean, var, norm.eps, alone, *act, fc_select)
    if alone or not norm.training:
        return gradients
    # What the gradients owe to the statistics, which are those of all processes.
    ds, dreduce, dweight, dbias, *dselect = gradients
    r, matrix = torch.rsqrt(var + norm.eps), fc_reduce.flatten(1).to(s.dtype)
    mean_dbias, mean_dweight = synchronize.summed(torch.stack([dbias, dweight]), norm.group) / images
    owed = (mean_dbias + (reduced - mean) * r * mean_dweight) * (r if weight is None else r * weight)
    with torch.autocast(s.device.type, enabled=False):
        return ds - owed @ matrix, dreduce - (owed.t() @ s).view_as(dreduce), dweight, dbias, *dselect


class _SelectiveKernel(torch.autograd.Function):
    """v; mean and unbiased variance of the batch, of the branches, (M, C), and of the attention, (D,), each where it is used.

    For the native backend in eager mode csrc/selective_kernel.cpp does the same, line by line.

    Gradients are for `leaves`: fc_reduce, weight and bias of attn_norm, fc_select, select_bias, the weights of the M norms, their
    biases, and the branches, or x and the weights of its convolutions."""

    @staticmethod
    def forward(ctx, backend, convolution, act, attn_act, norms, attn_norm, *leaves):
        needs_grad = ctx is not None and any(ctx.needs_input_grad)
        training, group = norms[0].training, norms[0].group
        attn, weights, biases, tensors = _parted(leaves, len(norms))
        means, variances = [norm.running_mean for norm in norms], [norm.running_var for norm in norms]
        if convolution is None:
            ys = _in_one_layout(tensors)
            if training:
                means, variances = backend.branch_statistics(ys)
        else:
            (x,), kernels = _in_one_layout(tensors[:1]), _in_one_layout(tensors[1:])
            if ctx is None and not training and not attn_norm.training:
                branch_norms = weights, biases, means, variances, norms[0].eps
                fc_reduce, *affine, fc_select, _ = attn
                attention = fc_reduce, *affine, attn_norm.running_mean, attn_norm.running_var, attn_norm.eps, fc_select
                return backend.unit(x, kernels, *convolution, *branch_norms, *attention, *act),
            ys, *statistics = backend.branch(x, kernels, *convolution, training)
            if training:
                means, variances = statistics
        B, _, H, W = ys[0].shape
        count = B * H * W
        trained = []
        if training:
            if group is not None:
                means, variances, count = synchronize.joined_moments(means, variances, count, group)
            trained.append((means, variances, count))
            means, variances = means.unbind(), variances.unbind()
        # The second and third sum serve the backward.
        sums = 3 if needs_grad else 1
        mean, r, scale, bias, pooled, K = backend.squeeze(ys, weights, biases, means, variances, norms[0].eps, *act, sums)
        a, s, reduced, attn_mean, attn_var, images = _attend(backend, attn_act, attn_norm, pooled, H * W, *attn)
        v = backend.select(ys, mean, scale, bias, a, *act)
        if attn_norm.training:
            trained.append((attn_mean, attn_var, images))
        moments = _unbiased(trained)
        if ctx is not None:
            ctx.mark_non_differentiable(*moments)
            ctx.set_materialize_grads(False)
        if needs_grad:
            ctx.backend, ctx.call, ctx.counts = backend, (convolution, act, attn_act, norms, attn_norm), (count, images)
            ctx.save_for_backward(mean, r, scale, bias, *K, s, a, reduced, attn_mean, attn_var, *leaves, *(ys if convolution else ()))
        return v, *moments

    @staticmethod
    def backward(ctx, g, *_):
        backend, (convolution, act, attn_act, norms, attn_norm) = ctx.backend, ctx.call
        needs = ctx.needs_input_grad[6:]
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        mean, r, scale, bias, K1, K2, s, a, reduced, attn_mean, attn_var, *rest = ctx.saved_tensors
        leaves = rest[: len(needs)]
        if torch.is_grad_enabled():
            return *(None,) * 6, *_differentiable(_SelectiveKernel, ctx.call, [*norms, attn_norm], g, leaves, needs)
        training, group = norms[0].training, norms[0].group
        attn, _, _, tensors = _parted(leaves, len(norms))
        ys = rest[len(needs) :] if convolution else _in_one_layout(tensors)
        g = g.contiguous(memory_format=layout_of(ys[0]))
        *_, H, W = g.shape
        count, images = ctx.counts

        # The reducing pass: Σ g·u is the gradient of a.
        da, R1, R2 = backend.select_backward_sums(g, ys, mean, scale, bias, *act)
        ds, *dattn = _attend_backward(backend, attn_act, attn_norm, da, a, s, reduced, attn_mean, attn_var, images, *attn[:4])
        alone = training and group is None
        t, dweight, dbias, p, q = backend.fold_backward(a, ds, H * W, R1, R2, K1, K2, r, scale, count if alone else 0)

        # The writing pass.
        dtensors = [None] * len(tensors)
        if any(needs[-len(tensors) :]):
            if training and not alone:
                total_dbias, total_dweight = synchronize.summed(torch.stack([dbias, dweight]), group)
                share = scale / count
                p, q = share * total_dbias, share * r * total_dweight
            if convolution is None:
                dtensors = backend.select_backward(g, ys, mean, scale, bias, a, t, p, q, *act)
            else:
                (x,), kernels = _in_one_layout(tensors[:1]), _in_one_layout(tensors[1:])
                needs_x, *needs_kernels = needs[-len(tensors) :]
                wanted = [needs_x, any(needs_kernels)]
                dx, dkernels = backend.branch_backward(g, x, kernels, *convolution, ys, mean, scale, bias, a, t, p, q, *act, wanted)
                dtensors = dx, *(dkernels or [None] * len(kernels))
        gradients = *dattn, *dweight.unbind(), *dbias.unbind(), *dtensors
        return *(None,) * 6, *(gradient if need else None for gradient, need in zip(gradients, needs))


def _parted(leaves: Sequence[Tensor | None], M: int) -> tuple[Sequence[Tensor | None], ...]:
    """Those of the attention; the weights and the biases of the branches' batch-norms; the branches, or what makes them."""
    return leaves[:5], leaves[5 : 5 + M], leaves[5 + M : 5 + 2 * M], leaves[5 + 2 * M :]


def _differentiable(function, call, norms, g, leaves, needs) -> list[Tensor | None]:
    """The gradients that autograd makes of the reference: for gradients of gradients."""
    if any(norm.training and norm.group is not None for norm in norms):
        raise RuntimeError("gradients of gradients are not there for synchronised batch-norms: use BatchNorm2d instead of SyncBatchNorm")
    # A parameter that is used twice gets a gradient for each use.
    leaves = [None if leaf is None else leaf.view_as(leaf) for leaf in leaves]
    output = function.forward(None, reference, *call, *leaves)[0]
    wanted = [leaf for leaf, need in zip(leaves, needs) if need]
    gradients = iter(torch.autograd.grad(output, wanted, g, create_graph=True, allow_unused=True))
    return [next(gradients) if need else None for need in needs]


class _Attend(torch.autograd.Function):
    """a; mean and unbiased variance of the batch if they are used. `leaves`: s as (B, 1, C), fc_reduce, weight and bias of norm,
    fc_select, select_bias."""

    @staticmethod
    def forward(ctx, backend, act, norm, *leaves):
        pooled, *attn = leaves
        a, s, reduced, mean, var, images = _attend(backend, act, norm, pooled, 1, *attn)
        moments = _unbiased([(mean, var, images)] if norm.training else [])
        if ctx is not None:
            ctx.backend, ctx.call, ctx.images = backend, (act, norm), images
            ctx.save_for_backward(a, s, reduced, mean, var, *leaves)
            ctx.mark_non_differentiable(*moments)
            ctx.set_materialize_grads(False)
        return a, *moments

    @staticmethod
    def backward(ctx, da, *_):
        if da is None:
            return (None,) * len(ctx.needs_input_grad)
        backend, (act, norm), needs = ctx.backend, ctx.call, ctx.needs_input_grad[3:]
        a, s, reduced, mean, var, *leaves = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable(_Attend, ctx.call, [norm], da, leaves, needs)
        _, *attn, _ = leaves
        ds, *dattn = _attend_backward(backend, act, norm, da.contiguous(), a, s, reduced, mean, var, ctx.images, *attn)
        gradients = ds[:, None], *dattn
        return None, None, None, *(gradient if need else None for gradient, need in zip(gradients, needs))


def _in_one_layout(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In that of the first."""
    layout = layout_of(tensors[0])
    return [tensor.contiguous(memory_format=layout) for tensor in tensors]


def _check(branches: Sequence[Tensor], norms: Sequence[BatchNorm], fc_reduce: Tensor, fc_select: Tensor, activation: str) -> None:
    if isinstance(branches, Tensor):
        raise TypeError(f"branches: expected a list of tensors, got one tensor of shape {tuple(branches.shape)}")
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
    _check_norms(norms, len(branches))
    _check_unit(first, first.shape, len(branches), norms, fc_reduce, fc_select, activation)


def _check_norms(norms: Sequence[BatchNorm], M: int) -> None:
    if isinstance(norms, BatchNorm):
        raise TypeError(f"norms: expected a list with a BatchNorm for each of the {M} branches, got one BatchNorm alone")
    if len(norms) != M:
        raise ValueError(f"norms: expected one for each of the {M} branches, got {len(norms)}")


def _check_unit(like: Tensor, shape: Sequence[int], M: int, norms: Sequence[BatchNorm], fc_reduce: Tensor, fc_select: Tensor, activation: str) -> None:
    """Of M branches of this shape, on the device of `like`."""
    # Of a batch over several processes, this one's part may be empty.
    if 0 in shape and norms[0].group is None:
        raise ValueError(f"branches: expected at least one value, got shape {tuple(shape)}")
    reason = why_not_together(norms)
    if reason:
        raise ValueError(f"norms: {reason}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_attention("branches", like, shape[1], fc_reduce, fc_select, M)


def _check_attention(name: str, like: Tensor, C: int, fc_reduce: Tensor, fc_select: Tensor, M: int | None = None) -> None:
    if not like.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {like.dtype}")
    D = fc_reduce.shape[0]
    if fc_reduce.shape not in ((D, C), (D, C, 1, 1)):
        raise ValueError(f"fc_reduce: expected shape (D, {C}) or (D, {C}, 1, 1), got {tuple(fc_reduce.shape)}")
    rows = fc_select.shape[0] if M is None else M * C
    if rows % C or fc_select.shape not in ((rows, D), (rows, D, 1, 1)):
        raise ValueError(f"fc_select: expected shape ({M or 'M'} * {C}, {D}) or the same with 1, 1, got {tuple(fc_select.shape)}")
    for name, tensor in (("fc_reduce", fc_reduce), ("fc_select", fc_select)):
        if tensor.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")


def _check_attn_act(attn_act: tuple[str, float], select_bias: Tensor | None, fc_select: Tensor, like: Tensor) -> None:
    if attn_act[0] not in ATTN_ACTIVATIONS:
        raise ValueError(f"attn_activation: expected one of {', '.join(ATTN_ACTIVATIONS)}, got {attn_act[0]!r}")
    if select_bias is not None and (select_bias.shape != fc_select.shape[:1] or select_bias.device != like.device):
        expected = f"shape {tuple(fc_select.shape[:1])} on {like.device}"
        raise ValueError(f"select_bias: expected {expected}, got {tuple(select_bias.shape)} on {select_bias.device}")
