"""Drop-ins for timm's SelectiveKernel and SelectiveKernelAttn: the same arguments, parameters, checkpoints and numbers."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional
from .backends import only_pytorch, warn_once
from .functional import BatchNorm, count_batches, parameter


def _timm_twin(module: nn.Module) -> nn.Module:
    """timm's module of the same layers, for torch.jit.script, which compiles a module's Python; timm writes its own for that.

    Raises:
        ImportError: timm is not installed.
    """
    from timm import layers
    from timm.layers.selective_kernel import SelectiveKernelAttn

    twin = copy.copy(module)
    # The scripting puts twins in here too.
    twin._modules = dict(module._modules)
    name = type(module).__name__.removeprefix("Fused")
    twin.__class__ = SelectiveKernelAttn if name == "SelectiveKernelAttn" else getattr(layers, name)
    return twin


def _called(module: nn.Module) -> str:
    """What a warning calls a unit: by its name in the model, where `fuse` has seen it there."""
    return f"the SelectiveKernel {module.name_in_model}" if module.name_in_model else "a SelectiveKernel"


def leaf(module: nn.Module, x: fx.Proxy | Sequence[fx.Proxy]) -> fx.Proxy:
    """The call of `module` as one node of an fx trace, whose proxies have no shapes to look at.

    Raises:
        TypeError: `module` is all that is traced.
    """
    tracer = (x if isinstance(x, fx.Proxy) else x[0]).tracer
    if tracer.root is module:
        raise TypeError(f"{type(module).__name__} is one node of an fx trace: trace a module that holds it")
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


class FusedSelectiveKernel(nn.Module):
    """The Selective Kernel unit (Li et al., Selective Kernel Networks, section 3.1), as timm has it, with the work after
    the branches' convolutions fused.

    (B, in_channels, H, W) → (B, out_channels, H', W'), with a stride of 1 or 2 H' = ⌈H/stride⌉, in the layout of the convolutions'
    output (channels_last stays channels_last), and in the autocast dtype under autocast. The same seed gives the same initial weights as timm's
    class, and the state_dict is the same. What cannot be fused (see `why_not`) runs as timm runs it, and a
    RuntimeWarning says so once.

    Args:
        in_channels: channels of the input.
        out_channels: channels of every branch and of the output; None: `in_channels`.
        kernel_size: one odd number ≥ 3 for two such branches, or a list with one for each branch; None: [3, 5].
        stride: stride of the branches, one number or, without `aa_layer`, two.
        dilation: dilation of the branches, one number, by which the one of `keep_3x3` is multiplied.
        groups: groups of the branches' convolutions; above `out_channels`, that.
        rd_ratio: D = out_channels · rd_ratio, the attention's reduced channels, rounded to `rd_divisor`.
        rd_channels: D itself, if given.
        rd_divisor: what D is a multiple of.
        keep_3x3: a k × k branch is 3 × 3 with dilation (k − 1)/2.
        split_input: every branch sees its share of the input's channels instead of all.
        act_layer, norm_layer: classes of the branches' activation and norm. BatchNorm2d with ReLU, LeakyReLU, SiLU or
            None is fused. A norm other than (a partial of) BatchNorm2d, or either given by name, needs timm installed.
        aa_layer: anti-aliasing after the branches if stride > 1; needs timm installed; not fused.
        drop_layer: class of the drop layer between norm and activation; not fused.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: a kernel size is even or below 3; in_channels cannot be split; groups do not divide a branch's channels; in
            `forward`, x has the wrong rank, channels or device, or, in training, one value per channel only.
        TypeError: in `forward`, x has not the floating-point dtype of the weights (outside autocast).
        ImportError: an argument needs timm, and it is not installed.
        RuntimeError: in `forward`, a backend is forced (`use_backend`) that cannot take x.
    """

    __prepare_scriptable__ = _timm_twin

    # Set by `fuse`, for warnings.
    name_in_model: str = ""

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | list[int] | None = None,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        rd_ratio: float = 1.0 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        keep_3x3: bool = True,
        split_input: bool = True,
        act_layer: type[nn.Module] | None = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        aa_layer: type[nn.Module] | None = None,
        drop_layer: type[nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        out_channels = out_channels or in_channels
        sizes = kernel_size or [3, 5]
        sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes] * 2
        if any(size < 3 or size % 2 == 0 for size in sizes):
            raise ValueError(f"kernel_size: expected odd numbers of at least 3, got {kernel_size}")
        self.num_paths = len(sizes)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.split_input = split_input
        if split_input and in_channels % self.num_paths:
            raise ValueError(f"in_channels: expected a multiple of the {self.num_paths} branches that split it, got {in_channels}")
        branch = dict(
            in_channels=in_channels // self.num_paths if split_input else in_channels,
            out_channels=out_channels,
            stride=stride,
            groups=min(out_channels, groups),
            act_layer=act_layer,
            norm_layer=norm_layer,
            aa_layer=aa_layer,
            drop_layer=drop_layer,
            device=device,
            dtype=dtype,
        )
        ConvNormAct = _conv_norm_act(act_layer, norm_layer, aa_layer if aa_layer is not None and stride > 1 else None)
        if device is None and dtype is None:
            # Older versions of timm do not know them.
            del branch["device"], branch["dtype"]
        self.paths = nn.ModuleList(
            ConvNormAct(kernel_size=3, dilation=dilation * (size - 1) // 2, **branch)
            if keep_3x3
            else ConvNormAct(kernel_size=size, dilation=dilation, **branch)
            for size in sizes
        )
        attn_channels = rd_channels or _make_divisible(out_channels * rd_ratio, rd_divisor)
        self.attn = FusedSelectiveKernelAttn(out_channels, self.num_paths, attn_channels, device=device, dtype=dtype)

    def why_not(self) -> str | None:
        """The reason why this unit, as it stands, is not fused wholly, or None."""
        return self._why_not_attn() or self._why_not_layers() or functional.why_not_together([BatchNorm.of(path.bn) for path in self.paths])

    def _why_not_attn(self) -> str | None:
        attn = self._modules["attn"]
        if type(attn) is not FusedSelectiveKernelAttn:
            return f"attn is a {type(attn).__name__}"
        return "attn has hooks" if _hooked(attn) else attn.why_not()

    def _why_not_layers(self) -> str | None:
        """Of the branches."""
        first = None
        for i, path in enumerate(self._branches()):
            if type(path).__name__ != "ConvNormAct":
                return f"paths.{i} is a {type(path).__name__}"
            bn, aa = path._modules["bn"], path._modules.get("aa")
            if aa is not None:
                return f"paths.{i} has the anti-aliasing layer {type(aa).__name__}"
            if type(bn).__name__ not in _BRANCH_NORMS:
                return f"paths.{i} has the norm layer {type(bn).__name__}"
            drop, act = bn._modules.get("drop"), bn._modules.get("act")
            if type(drop) not in _NOTHING:
                return f"paths.{i} has the drop layer {type(drop).__name__}"
            if type(act) not in _ACTIVATIONS:
                return f"paths.{i} has the activation {type(act).__name__}"
            if _hooked(path, bn, drop, act):
                return f"paths.{i} has hooks"
            activation = _activation(act)
            if first not in (None, activation):
                return f"the branches differ in their activation: {first}, {activation}"
            first = activation
        return None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return leaf(self, x)
        self._check(x)
        attn, paths = self._modules["attn"], self._branches()
        reason = self._why_not_attn()
        attn_norm = None if reason else BatchNorm.of(attn._modules["bn"])
        # An empty batch has no statistics, unless others have some; PyTorch's own semantics for it are timm's.
        if reason or x.shape[0] == 0 and attn_norm.group is None:
            if reason:
                warn_once(f"sk_fused runs {_called(self)} unfused: {reason}")
            u = torch.stack([_branch(path, x_m) for path, x_m in zip(paths, self._inputs(x))], 1)
            return (u * attn(u)).sum(1).to(u.dtype)
        fc_reduce, fc_select = parameter(attn._modules["fc_reduce"], "weight"), parameter(attn._modules["fc_select"], "weight")
        reason = self._why_not_layers()
        bns = [] if reason else [path._modules["bn"] for path in paths]
        norms = [BatchNorm.of(bn) for bn in bns]
        reason = reason or functional.why_not_together(norms)
        if reason:
            warn_once(f"sk_fused fuses only the attention of {_called(self)}: {reason}")
            us = [_branch(path, x_m) for path, x_m in zip(paths, self._inputs(x))]
            v = functional.selective_kernel(us, _identity(us), fc_reduce, attn_norm, fc_select, "identity")
            count_batches(attn._modules["bn"])
            return v
        activation = _activation(bns[0]._modules.get("act"))
        convs = [path._modules["conv"] for path in paths]
        if self._are_plain(convs):
            weights = [parameter(conv, "weight") for conv in convs]
            convolution = convs[0].stride[0], [conv.dilation[0] for conv in convs], convs[0].groups
            v = functional.convolved(x, weights, *convolution, norms, fc_reduce, attn_norm, fc_select, *activation)
            if v is not None:
                count_batches(attn._modules["bn"], *bns)
                return v

        def unit(xs: Sequence[Tensor]) -> Tensor:
            ys = [conv(x_m) for conv, x_m in zip(convs, xs)]
            return functional.selective_kernel(ys, norms, fc_reduce, attn_norm, fc_select, *activation)

        xs = self._inputs(x)
        # Asked first: a batch of any size, compiled or exported, must not be compared with a number.
        images = self._images_in_cache(x) if self._images_are_independent(convs, [attn_norm, *norms]) else None
        v = unit(xs) if images is None or images >= x.shape[0] else self._few_at_once(unit, x, xs, images)
        count_batches(attn._modules["bn"], *bns)
        return v

    def _branches(self) -> list[nn.Module]:
        # nn.Module's attributes cost more than all else that is asked here of a module.
        return [*self._modules["paths"]._modules.values()]

    def _inputs(self, x: Tensor) -> Sequence[Tensor]:
        """Of the branches."""
        return x.split(self.in_channels // self.num_paths, 1) if self.split_input else [x] * self.num_paths

    def _are_plain(self, convs: Sequence[nn.Module]) -> bool:
        """Whether these are square convolutions that nobody listens to, with one stride and groups, padded by what they reach."""
        if _hooked(*convs):
            return False
        first = convs[0]
        for conv in convs:
            if type(conv) is not nn.Conv2d or parameter(conv, "bias") is not None or conv.padding_mode != "zeros":
                return False
            (size, width), (dilation, across), (stride, sideways) = conv.kernel_size, conv.dilation, conv.stride
            if size != width or dilation != across or stride != sideways or conv.padding != (dilation * (size // 2),) * 2:
                return False
            if conv.groups != first.groups or conv.stride != first.stride:
                return False
        return True

    def _images_are_independent(self, convs: Sequence[nn.Module], norms: Sequence[BatchNorm]) -> bool:
        """Whether nothing looks at the batch as a whole: no batch statistics, no graph to build, no hook that counts calls."""
        return (
            not torch.is_grad_enabled()
            and not any(norm.training for norm in norms)
            and not _hooked(*convs)
            and not torch.compiler.is_compiling()
            and only_pytorch() is None
        )

    def _images_in_cache(self, x: Tensor) -> int:
        """On a CPU, of how many images the branches stay in cache until they are selected; at least one."""
        stride = getattr(self._branches()[0]._modules["conv"], "stride", None)
        if x.device.type != "cpu" or not isinstance(stride, tuple):
            return x.shape[0]
        image = self.num_paths * self.out_channels * (x.shape[2] // stride[0]) * (x.shape[3] // stride[1]) * x.element_size()
        return max(1, _CACHE_BYTES // max(1, image))

    def _few_at_once(self, unit: Callable[[Sequence[Tensor]], Tensor], x: Tensor, xs: Sequence[Tensor], images: int) -> Tensor:
        """`unit`, this many images at a time."""
        parts = zip(*(x_m.split(images) for x_m in xs))
        first = unit(next(parts))
        v = torch.empty((x.shape[0], *first.shape[1:]), dtype=first.dtype, device=first.device, memory_format=functional.layout_of(first))
        outputs = iter(v.split(images))
        next(outputs).copy_(first)
        for output, part in zip(outputs, parts):
            output.copy_(unit(part))
        return v

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        _check_like_weights(x, self._modules["paths"]._modules["0"])
        if x.shape[0] == 1:
            # A branch's batch-norm must not count a batch that the attention's will refuse.
            bn = self._modules["attn"]._modules.get("bn")
            if isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not _hooked(bn):
                BatchNorm.of(bn).check("attn.bn", (1, bn.num_features, 1, 1), x.device)


class FusedSelectiveKernelAttn(nn.Module):
    """The attention of the unit alone, as timm has it: (B, M, C, H, W), the stacked branches, → (B, M, C, 1, 1), weights
    that add up to 1 over the M branches, in their dtype. It also takes the branches in a list, M times (B, C, H, W), so that they
    need not be stacked. What cannot be fused (see `why_not`) runs as timm runs it, and a RuntimeWarning says so once.

    Args:
        channels: C.
        num_paths: M.
        attn_channels: D, the channels between the two 1 × 1 convolutions.
        act_layer, norm_layer: classes; ReLU and BatchNorm2d are fused.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: in `forward`, branches of another number or shape, or on another device than the weights; in training, one
            value per channel only.
        TypeError: in `forward`, branches that have not the floating-point dtype of the weights (outside autocast).
        RuntimeError: in `forward`, a backend is forced (`use_backend`) that cannot take them.
    """

    __prepare_scriptable__ = _timm_twin

    # Of the unit that it is part of.
    name_in_model: str = ""

    def __init__(
        self,
        channels: int,
        num_paths: int = 2,
        attn_channels: int = 32,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.num_paths = num_paths
        self.fc_reduce = nn.Conv2d(channels, attn_channels, kernel_size=1, bias=False, device=device, dtype=dtype)
        self.bn = norm_layer(attn_channels, device=device, dtype=dtype)
        self.act = act_layer(inplace=True)
        self.fc_select = nn.Conv2d(attn_channels, channels * num_paths, kernel_size=1, bias=False, device=device, dtype=dtype)

    def why_not(self) -> str | None:
        """The reason why this attention, as it stands, is not fused, or None."""
        if _has_any_global_hook():
            return "hooks are registered on all modules"
        layers = self._modules
        bn, act = layers["bn"], layers["act"]
        # Not every project's frozen norm has an eps that can be asked for.
        frozen = type(bn).__name__ == "FrozenBatchNorm2d" and hasattr(bn, "eps")
        if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm) and not frozen:
            return f"attn.bn is a {type(bn).__name__}"
        if type(act) is not nn.ReLU:
            return f"attn.act is a {type(act).__name__}"
        for name in ("fc_reduce", "fc_select"):
            conv = layers[name]
            if type(conv) is not nn.Conv2d or conv.kernel_size != (1, 1) or parameter(conv, "bias") is not None or conv.groups != 1:
                return f"attn.{name} is not a 1 × 1 convolution without bias and groups: {conv}"
        if _hooked(layers["fc_reduce"], bn, act, layers["fc_select"]):
            return "the layers of attn have hooks"
        return None

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        us = [x] if isinstance(x, (Tensor, fx.Proxy)) else [*x]
        if us and isinstance(us[0], fx.Proxy):
            return leaf(self, x)
        M, stacked = self.num_paths, isinstance(x, Tensor)
        shapes = [tuple(u.shape) for u in us]
        if stacked and (x.dim() != 5 or x.shape[1] != M):
            raise ValueError(f"x: expected shape (B, {M}, C, H, W), got {shapes[0]}")
        if not stacked and (len(us) != M or len({*shapes}) != 1 or len(shapes[0]) != 4):
            raise ValueError(f"x: expected {M} tensors of one shape (B, C, H, W), got {shapes}")
        for u in us:
            _check_like_weights(u, self.fc_reduce)
        s = self._squeeze(us)
        reason = self.why_not()
        if reason or s.shape[0] == 0:
            if reason:
                # The same sentence as the unit's, which may just have said it.
                warn_once(f"sk_fused runs {_called(self)} unfused: {reason}")
            logits = self.fc_select(self.act(self.bn(self.fc_reduce(s[..., None, None]))))
            return logits.unflatten(1, (self.num_paths, -1)).softmax(1)
        a = functional.attend(s, self.fc_reduce.weight, BatchNorm.of(self.bn), self.fc_select.weight)
        count_batches(self.bn)
        return a[..., None, None]

    @staticmethod
    def _squeeze(us: Sequence[Tensor]) -> Tensor:
        """(B, C), the mean of the sum of the branches: read once, and no sum of that size is written."""
        dtype = functional.accumulate_dtype(us[0].dtype)
        means = [u.mean((-2, -1), dtype=dtype) for u in us]
        return (means[0].sum(1) if means[0].dim() == 3 else sum(means)).to(us[0].dtype)


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch-norm, drop layer, activation: the structure of timm's class of this name, for units made without timm."""

    __prepare_scriptable__ = _timm_twin

    def __init__(self, num_features: int, act_layer: type[nn.Module] | None, drop_layer: type[nn.Module] | None, **kwargs):
        super().__init__(num_features, **kwargs)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        try:
            self.act = nn.Identity() if act_layer is None else act_layer(inplace=True)
        except TypeError:
            self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class ConvNormAct(nn.Module):
    """One branch: the structure of timm's class of this name, for units made without timm."""

    __prepare_scriptable__ = _timm_twin

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int | tuple[int, int],
        dilation: int | tuple[int, int],
        groups: int,
        act_layer: type[nn.Module] | None,
        norm_layer: type[nn.Module],
        aa_layer: None,
        drop_layer: type[nn.Module] | None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        strides, dilations = (value if isinstance(value, (tuple, list)) else (value, value) for value in (stride, dilation))
        padding = tuple((s - 1 + d * (kernel_size - 1)) // 2 for s, d in zip(strides, dilations))
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False, device=device, dtype=dtype
        )
        options = norm_layer.keywords if isinstance(norm_layer, functools.partial) else {}
        self.bn = BatchNormAct2d(out_channels, **{"act_layer": act_layer, "drop_layer": drop_layer, "device": device, "dtype": dtype, **options})
        self.aa = None
        # What `timm.utils.freeze` puts in the place of a norm that it does not know has neither.
        self._after_norm = self.bn.drop, self.bn.act

    @property
    def in_channels(self) -> int:
        return self.conv.in_channels

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        if "act" in self.bn._modules:
            return x
        drop, act = self._after_norm
        return act(drop(x))


def _conv_norm_act(act_layer, norm_layer, aa_layer) -> type[nn.Module]:
    """The class of the branches: timm's where timm is in use, whose converters know it; else ours, for what that can build."""
    norm = norm_layer.func if isinstance(norm_layer, functools.partial) else norm_layer
    if norm is nn.BatchNorm2d and aa_layer is None and not isinstance(act_layer, str) and "timm.layers" not in sys.modules:
        return ConvNormAct
    try:
        from timm.layers import ConvNormAct as timm_conv_norm_act
    except ImportError as error:
        raise ImportError(f"act_layer={act_layer}, norm_layer={norm_layer}, aa_layer={aa_layer} needs timm: {error}") from error
    return timm_conv_norm_act


# Of the branches in flight: a part of what a core's share of the last-level cache holds on today's servers.
_CACHE_BYTES = 4 << 20

_NOTHING = (type(None), nn.Identity)
_ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu", **dict.fromkeys(_NOTHING, "identity")}

# With drop layer and activation inside: timm's, ours above, and what torch's and timm's converters make of them.
_BRANCH_NORMS = ("BatchNormAct2d", "SyncBatchNormAct", "SyncBatchNorm", "FrozenBatchNormAct2d")


def _check_like_weights(x: Tensor, layer: nn.Module) -> None:
    """Raises if x has not the device and, outside autocast, the dtype of the layer's weights."""
    layer = layer._modules.get("conv", layer)
    weight = layer._parameters.get("weight")
    if weight is not None and x.dtype == weight.dtype and x.device == weight.device:
        return
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    # A hook may bring the weights, and a parametrisation makes them.
    if weight is None or _hooked(layer):
        return
    if x.device != weight.device:
        raise ValueError(f"x: expected a tensor on {weight.device}, the device of the weights, got one on {x.device}")
    if x.dtype != weight.dtype and not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"x: expected {weight.dtype}, the dtype of the weights, got {x.dtype}")


def _activation(act: nn.Module | None) -> tuple[str, float]:
    """Its name in `functional` and its negative slope."""
    return _ACTIVATIONS[type(act)], act.negative_slope if type(act) is nn.LeakyReLU else 0.0


def _branch(path: nn.Module, x: Tensor) -> Tensor:
    """path(x). torch's convert_sync_batchnorm keeps the drop layer and the activation inside the batch-norm, but its forward
    leaves them out."""
    bn = getattr(path, "bn", None)
    if type(bn) is not nn.SyncBatchNorm or "act" not in bn._modules:
        return path(x)
    u = bn.act(bn.drop(bn(path.conv(x))))
    return u if path.aa is None else path.aa(u)


def _identity(us: Sequence[Tensor]) -> list[BatchNorm]:
    """Batch-norms that change nothing."""
    return [functional.without_norm(us[0].shape[1], us[0])] * len(us)


def _hooked(*modules: nn.Module | None) -> bool:
    """Whether somebody listens to modules that the fused road does not call, or has replaced the forward of one."""
    for module in modules:
        if module is not None:
            own = module.__dict__
            if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
                return True
    return False


def _make_divisible(value: float, divisor: int) -> int:
    """`value` to the nearest multiple of `divisor`, at least one, and not below 0.9 · value."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
