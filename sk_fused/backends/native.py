"""The C++ extension: csrc/library.cpp lists the operators, csrc/cpu and csrc/cuda have the kernels."""

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
    device = branches[0].device
    if device.type not in ("cpu", "cuda"):
        return f"the native kernels run on a CPU or a CUDA device, the branches are on {device}"
    if device.type == "cuda":
        reason = _why_not_on_cuda(device, len(branches))
        if reason:
            return reason
    if branches[0].dtype not in DTYPES:
        return f"the native kernels take float32, float64, bfloat16 and float16, the branches are {branches[0].dtype}"
    if branches[0].shape[0] == 0:
        return "the native kernels take at least one image, the batch is empty"
    return None


@torch.compiler.assume_constant_result
def _why_not_on_cuda(device: torch.device, branches: int) -> str | None:
    built = [int(architecture.rstrip("a")) for architecture in _C.cuda_architectures.split()]
    if not built:
        return "the native extension was built without nvcc: it has no CUDA kernels"
    major, minor = torch.cuda.get_device_capability(device)
    if not any(architecture // 10 == major and architecture % 10 <= minor for architecture in built):
        return f"the native CUDA kernels are for the architectures {_C.cuda_architectures}, the device has compute capability {major}.{minor}"
    if branches > 8:
        return f"the native CUDA kernels take at most 8 branches, got {branches}"
    return None


def why_not_convolve(
    shape: torch.Size, dtype: torch.dtype, weights: Sequence[torch.Size], stride: int, dilations: Sequence[int], groups: int, device: torch.device
) -> str | None:
    """The reason why convolutions of an x of this shape, dtype and device are left to PyTorch, or None."""
    if device.type != "cpu":
        return f"the native convolutions run on a CPU, the input is on {device}"
    inputs, outputs, M = weights[0][1], weights[0][0] // groups, len(weights)
    if any(w != (groups * outputs, inputs, 3, 3) for w in weights) or shape[1] not in (groups * inputs, M * groups * inputs):
        return f"the native convolutions are 3 × 3 of one input or of its parts, got weights {[tuple(w) for w in weights]} for {shape[1]} channels"
    if M > 8 or not all(1 <= d <= 3 for d in dilations):
        return f"the native convolutions have at most 8 branches and dilations from 1 to 3, got {M} and {list(dilations)}"
    if inputs == outputs and inputs in (4, 8, 16, 32) and shape[1] == groups * inputs and stride in (1, 2) and dtype != torch.float64:
        return None
    # In half precision the library's dense convolutions use instructions for it, and are faster.
    if inputs % 16 == 0 and outputs % 16 == 0 and stride == 1 and dtype == torch.float32:
        return None
    return (
        "the native convolutions are for 4, 8, 16 or 32 channels a group, in and out, of one input, with stride 1 or 2, in float32, bfloat16 "
        f"or float16; or for multiples of 16, with stride 1, in float32; got {inputs} in, {outputs} out, stride {stride}, {dtype}"
    )


if _C is not None:
    branch_statistics = torch.ops.sk_fused.branch_statistics.default
    branch = torch.ops.sk_fused.branch.default
    squeeze = torch.ops.sk_fused.squeeze.default
    attend = torch.ops.sk_fused.attend.default
    select = torch.ops.sk_fused.select.default
    unit = torch.ops.sk_fused.unit.default
    select_backward_sums = torch.ops.sk_fused.select_backward_sums.default
    attend_backward = torch.ops.sk_fused.attend_backward.default
    fold_backward = torch.ops.sk_fused.fold_backward.default
    select_backward = torch.ops.sk_fused.select_backward.default
    branch_backward = torch.ops.sk_fused.branch_backward.default

    def _output(x: Tensor, weights: Sequence[Tensor], stride: int) -> Tensor:
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        B, _, H, W = x.shape
        return torch.empty((B, weights[0].shape[0], (H - 1) // stride + 1, (W - 1) // stride + 1), dtype=x.dtype, device=x.device, memory_format=layout)

    @torch.library.register_fake("sk_fused::branch_statistics")
    def _(ys):
        shape, dtype = (len(ys), ys[0].shape[1]), accumulate_dtype(ys[0].dtype)
        return ys[0].new_empty(shape, dtype=dtype), ys[0].new_empty(shape, dtype=dtype)

    @torch.library.register_fake("sk_fused::branch")
    def _(x, weights, stride, dilations, groups):
        statistics = [x.new_empty((len(weights), weights[0].shape[0]), dtype=torch.float32) for _ in range(2)]
        return [_output(x, weights, stride) for _ in weights], *statistics

    @torch.library.register_fake("sk_fused::squeeze")
    def _(ys, norm_weights, norm_biases, means, variances, eps, activation, negative_slope, sums):
        like = means[0].new_empty((), dtype=accumulate_dtype(ys[0].dtype))
        (B, C), M = ys[0].shape[:2], len(ys)
        folded, pooled = ([like.new_empty(shape) for _ in range(count)] for shape, count in (((M, C), 4), ((B, M, C), sums)))
        return *folded, pooled[0], pooled[1:]

    @torch.library.register_fake("sk_fused::attend")
    def _(pooled, pixels, fc_reduce, weight, bias, mean, var, eps, activation, negative_slope, fc_select, select_bias):
        (B, _, C), D = pooled.shape, fc_reduce.shape[0]
        return tuple(pooled.new_empty(shape) for shape in ((B, fc_select.shape[0] // C, C), (B, C), (B, D), (D,), (D,)))

    @torch.library.register_fake("sk_fused::select")
    def _(ys, mean, scale, bias, a, activation, negative_slope):
        return torch.empty_like(ys[0])

    @torch.library.register_fake("sk_fused::unit")
    def _(x, weights, stride, *arguments):
        return _output(x, weights, stride)

    @torch.library.register_fake("sk_fused::select_backward_sums")
    def _(g, ys, mean, scale, bias, activation, negative_slope):
        return tuple(mean.new_empty((ys[0].shape[0], *mean.shape)) for _ in range(3))

    @torch.library.register_fake("sk_fused::attend_backward")
    def _(da, a, s, reduced, fc_reduce, weight, bias, mean, var, eps, training, activation, negative_slope, fc_select):
        return tuple(s.new_empty(shape) for shape in (s.shape, fc_reduce.shape, mean.shape, mean.shape, fc_select.shape, fc_select.shape[:1]))

    @torch.library.register_fake("sk_fused::fold_backward")
    def _(a, ds, pixels, R1, R2, K1, K2, r, scale, count):
        return torch.empty_like(ds), *(torch.empty_like(r) for _ in range(4))

    @torch.library.register_fake("sk_fused::select_backward")
    def _(g, ys, mean, scale, bias, a, t, p, q, activation, negative_slope):
        return [torch.empty_like(y) for y in ys]

    @torch.library.register_fake("sk_fused::branch_backward")
    def _(g, x, weights, stride, dilations, groups, ys, mean, scale, bias, a, t, p, q, activation, negative_slope, needs):
        dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
        return dx, [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights] if needs[1] else []
