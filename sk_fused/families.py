"""Other projects' Selective Kernel units, on the same core: squeeze over the branches, a small network, softmax, weighted sum.

`fuse` finds them by the name of their class, by their layers and by what they compute, without importing the project, and changes
their class in place: layers, parameters and checkpoints stay. What the fused one cannot do runs as the project has it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional
from .backends import reference_in_this_thread, warn_once
from .functional import BatchNorm, count_batches
from .modules import _activation, _check_like_weights, _hooked, _identity, leaf

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_BRANCH_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.Identity)
_ATTN_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Identity)


def _project_twin(module: nn.Module) -> nn.Module:
    """The project's module of the same layers, for torch.jit.script."""
    twin = copy.copy(module)
    # The scripting puts twins in here too.
    twin._modules = dict(module._modules)
    twin.__class__ = twin.__dict__.pop("unfused_class")
    return twin


class Family(nn.Module):
    """A fused unit of another project, whose own class is `unfused_class`. The classes below say what its layers are
    (`structure`), what it may be given (`example`) and what its forward is (`_fused`)."""

    __prepare_scriptable__ = _project_twin

    unfused_class: type[nn.Module]
    # Set by `fuse`, for warnings.
    name_in_model: str = ""

    @staticmethod
    def structure(module: nn.Module) -> str | None:
        """What of the layers of `module` is not as the published unit has it, or None."""
        raise NotImplementedError

    @staticmethod
    def example(module: nn.Module) -> Tensor | list[Tensor]:
        """A small input of `module`, in float64."""
        raise NotImplementedError

    def _fused(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def why_not(self) -> str | None:
        """The reason why this unit, as it stands, is not fused, or None."""
        return self.structure(self) or _why_called(self)

    def forward(self, *args, **kwargs) -> Tensor:
        if kwargs or len(args) != 1:
            # By the project's own name of its argument.
            args = tuple(inspect.signature(self.unfused_class.forward).bind(self, *args, **kwargs).arguments.values())[1:]
        (x,) = args
        tensors = [x] if isinstance(x, (Tensor, fx.Proxy)) else [*x]
        if not tensors:
            raise ValueError(f"expected at least one tensor, got {x!r}")
        if isinstance(tensors[0], fx.Proxy):
            return leaf(self, x)
        reason = self.why_not()
        if reason or not tensors[0].numel():
            if reason:
                name = self.unfused_class.__name__
                warn_once(f"sk_fused runs {f'the {name} {self.name_in_model}' if self.name_in_model else f'a {name}'} unfused: {reason}")
            return self.unfused_class.forward(self, x)
        return self._fused(x)


def why_not_known(module: nn.Module, family: type[Family]) -> str | None:
    """The reason why `module` is not the unit that `family` fuses, or None: other layers, or hooks on them, which are not to be called
    for this; or, of the same layers, another forward, as both are run in eval, on a copy in float64."""
    reason = family.structure(module) or _why_called(module)
    if reason or any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return reason
    with torch.no_grad(), reference_in_this_thread():
        try:
            twin = copy.deepcopy(module).to("cpu", torch.float64).eval()
            x = family.example(twin)
            expected, v = type(module).forward(twin, x), family._fused(twin, x)
        except Exception as error:
            return f"a copy of it does not run as the published unit does: {error}"
    if not isinstance(expected, Tensor) or v.shape != expected.shape or not torch.allclose(v, expected, rtol=1e-6, atol=1e-9, equal_nan=True):
        return "its forward does not give what the published unit gives"
    return None


def adopt(module: nn.Module, family: type[Family]) -> None:
    """The project's module becomes the fused one."""
    module.unfused_class, module.__class__ = type(module), family


def give_back(module: Family) -> None:
    """It becomes the project's again, unless its class has become another's, as FSDP makes it."""
    if type(module) in FAMILIES.values():
        module.__class__ = module.__dict__.pop("unfused_class")


class FusedSKFF(Family):
    """Selective Kernel Feature Fusion (Zamir et al., Learning Enriched Features for Fast Image Restoration and Enhancement,
    section 3.2), as MIRNetv2 has it in `SKFF`: of M given branches u_m, (B, C, H, W), in a list

        v = Σ_m a_m·u_m,   a = softmax_m(fcs_m · leaky_relu(conv_du · mean_hw Σ_m u_m))
    """

    @staticmethod
    def structure(module: nn.Module) -> str | None:
        reason = _children(module, "avg_pool", "conv_du", "fcs", "softmax") or _softmax(module, 1)
        if reason:
            return reason
        if type(module.avg_pool) is not nn.AdaptiveAvgPool2d or module.avg_pool.output_size not in (1, (1, 1)):
            return f"avg_pool is not to one value: {module.avg_pool}"
        if getattr(module, "height", None) != len(module.fcs):
            return f"there are {len(module.fcs)} fcs for a height of {getattr(module, 'height', None)}"
        layers = _layers(module.conv_du)
        if len(layers) != 2 or type(layers[1]) not in _ATTN_ACTIVATIONS:
            return f"conv_du is not a convolution and ReLU, LeakyReLU or Identity: {module.conv_du}"
        return _product("conv_du.0", layers[0]) or _products("fcs", module.fcs)

    @staticmethod
    def example(module: nn.Module) -> list[Tensor]:
        return [*_random(module.height, 2, len(module.fcs[0].weight), 3, 4)]

    def _fused(self, x: Sequence[Tensor]) -> Tensor:
        if len(x) != self.height:
            raise ValueError(f"inp_feats: expected {self.height} tensors, got {len(x)}")
        reduce, act = self.conv_du.children()
        for u in x:
            _check_like_weights(u, reduce)
        weight, bias = _joined(self.fcs)
        norm = functional.without_norm(len(reduce.weight), x[0], reduce.bias)
        return functional.selective_kernel(x, _identity(x), reduce.weight, norm, weight, "identity", 0.0, *_activation(act), bias)


class FusedSKAttention(Family):
    """The unit of External-Attention-pytorch's `SKAttention`: M convolutions of x with biases, kernels 1, 3, 5, 7, each with
    batch-norm and ReLU; and one product for each branch, without norm and activation between the two

        v = Σ_m a_m·u_m,   u_m = relu(BN_m(w_m ∗ x + b_m)),   a = softmax_m(fcs_m · (fc · mean_hw Σ_m u_m + bias) + bias_m)
    """

    @staticmethod
    def structure(module: nn.Module) -> str | None:
        reason = _children(module, "convs", "fc", "fcs", "softmax") or _softmax(module, 0)
        if reason:
            return reason
        if len(module.convs) != len(module.fcs):
            return f"there are {len(module.fcs)} fcs for {len(module.convs)} convs"
        for i, path in enumerate(module.convs):
            layers = _layers(path)
            if len(layers) != 3 or type(layers[0]) is not nn.Conv2d or type(layers[1]) not in _NORMS or type(layers[2]) not in _BRANCH_ACTIVATIONS:
                return f"convs.{i} is not a convolution, BatchNorm2d and an activation that is fused: {path}"
        acts = {_activation(path[2]) for path in module.convs}
        if len(acts) > 1:
            return f"the branches differ in their activation: {', '.join(map(str, sorted(acts)))}"
        return (
            functional.why_not_together([BatchNorm.of(path[1]) for path in module.convs]) or _product("fc", module.fc) or _products("fcs", module.fcs)
        )

    @staticmethod
    def example(module: nn.Module) -> Tensor:
        return _random(2, module.convs[0][0].in_channels, 8, 7)

    def _fused(self, x: Tensor) -> Tensor:
        _check_like_weights(x, self.convs[0][0])
        bns, (weight, bias) = [path[1] for path in self.convs], _joined(self.fcs)
        ys = [path[0](x) for path in self.convs]
        act, norm = _activation(self.convs[0][2]), functional.without_norm(len(self.fc.weight), ys[0], self.fc.bias)
        v = functional.selective_kernel(ys, [*map(BatchNorm.of, bns)], self.fc.weight, norm, weight, *act, "identity", 0.0, bias)
        count_batches(*bns)
        return v


class FusedSimCLRSelectiveKernel(Family):
    """The unit of SimCLRv2 (Chen et al., Big Self-Supervised Models are Strong Semi-Supervised Learners, after google-research's
    `SK_Conv2D`), as its PyTorch versions have it in `SelectiveKernel`: one 3 × 3 convolution with 2C outputs, whose halves after
    batch-norm and ReLU are the branches u_m

        v = Σ_m a_m·u_m,   a = softmax_m(mixing_conv.2 · relu(BN(mixing_conv.0 · mean_hw Σ_m u_m)))
    """

    @staticmethod
    def structure(module: nn.Module) -> str | None:
        reason = _children(module, "main_conv", "mixing_conv")
        if reason:
            return reason
        main, mixing = _layers(module.main_conv), _layers(module.mixing_conv)
        if len(main) != 2 or len(mixing) != 3:
            return f"main_conv and mixing_conv have {len(main)} and {len(mixing)} layers, not 2 and 3"
        for name, layer, activations in (("main_conv.1", main[1], _BRANCH_ACTIVATIONS), ("mixing_conv.1", mixing[1], _ATTN_ACTIVATIONS)):
            layers = _layers(layer)
            if len(layers) != 2 or type(layers[0]) not in _NORMS or type(layers[1]) not in activations:
                return f"{name} is not BatchNorm2d and an activation that is fused: {layer}"
        conv = main[0]
        if type(conv) is not nn.Conv2d or conv.kernel_size != (3, 3) or conv.padding != (1, 1) or conv.dilation != (1, 1):
            return f"main_conv.0 is not a 3 × 3 convolution padded by 1: {conv}"
        if conv.bias is not None or conv.groups != 1 or conv.stride[0] != conv.stride[1] or conv.padding_mode != "zeros" or conv.out_channels % 2:
            return f"main_conv.0 has a bias, groups, a stride of its own in each direction, other padding than zeros or odd outputs: {conv}"
        return _product("mixing_conv.0", mixing[0], bias=False) or _product("mixing_conv.2", mixing[2])

    @staticmethod
    def example(module: nn.Module) -> Tensor:
        return _random(2, module.main_conv[0].in_channels, 8, 7)

    def _fused(self, x: Tensor) -> Tensor:
        conv, (bn, act) = self.main_conv[0], self.main_conv[1].children()
        reduce, (attn_bn, attn_act), select = self.mixing_conv[0], self.mixing_conv[1].children(), self.mixing_conv[2]
        _check_like_weights(x, conv)
        weights, stride = conv.weight.chunk(2), conv.stride[0]
        attention = reduce.weight, BatchNorm.of(attn_bn), select.weight
        norms, act = _halves(BatchNorm.of(bn)), _activation(act)
        ours = select.bias is None and type(attn_act) is nn.ReLU
        v = functional.convolved(x, weights, stride, [1, 1], 1, norms, *attention, *act) if ours else None
        if v is None:
            ys = [F.conv2d(x, weight, None, stride, 1) for weight in weights]
            v = functional.selective_kernel(ys, norms, *attention, *act, *_activation(attn_act), select.bias)
        count_batches(bn, attn_bn)
        return v


# By the name of the project's class.
FAMILIES: dict[str, type[Family]] = {"SKFF": FusedSKFF, "SKAttention": FusedSKAttention, "SelectiveKernel": FusedSimCLRSelectiveKernel}


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")


def _children(module: nn.Module, *names: str) -> str | None:
    """The reason why the layers of `module` are not of these names."""
    found = [name for name, _ in module.named_children()]
    return None if sorted(found) == sorted(names) else f"its layers are {', '.join(found) or 'none'}, not {', '.join(names)}"


def _why_called(module: nn.Module) -> str | None:
    """The reason why the layers of `module` have to be called: who listens to them."""
    if _has_any_global_hook():
        return "hooks are registered on all modules"
    return next((f"{name} has hooks" for name, layer in module.named_modules() if layer is not module and _hooked(layer)), None)


def _layers(module: nn.Module) -> list[nn.Module]:
    """In the order in which they are called; none if that is not known."""
    return [*module.children()] if isinstance(module, nn.Sequential) else []


def _softmax(module: nn.Module, dim: int) -> str | None:
    softmax = module.softmax
    return None if type(softmax) is nn.Softmax and softmax.dim == dim else f"softmax is not over dimension {dim}: {softmax}"


def _product(name: str, layer: nn.Module, bias: bool = True) -> str | None:
    """The reason why this is not a matrix product, Linear or a 1 × 1 convolution."""
    if type(layer) is nn.Conv2d:
        plain = layer.kernel_size == layer.stride == (1, 1) and layer.padding in ((0, 0), 0) and layer.groups == 1
    else:
        plain = type(layer) is nn.Linear
    if not plain or layer.bias is not None and not bias:
        return f"{name} is not Linear or a 1 × 1 convolution{'' if bias else ' without bias'}: {layer}"
    return None


def _products(name: str, layers: nn.ModuleList) -> str | None:
    for i, layer in enumerate(layers):
        reason = _product(f"{name}.{i}", layer)
        if reason:
            return reason
    biases = {layer.bias is None for layer in layers}
    return None if len(biases) == 1 else f"only some of {name} have a bias"


def _joined(layers: nn.ModuleList) -> tuple[Tensor, Tensor | None]:
    """One product in the place of several, one after the other: weight and bias."""
    weights, biases = zip(*((layer.weight.flatten(1), layer.bias) for layer in layers))
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def _halves(norm: BatchNorm) -> list[BatchNorm]:
    """Over the first and over the second half of the channels; the running statistics are parts of the whole's."""
    vectors = [[None, None] if vector is None else vector.chunk(2) for vector in norm[:4]]
    return [BatchNorm(*half, *norm[4:]) for half in zip(*vectors)]
