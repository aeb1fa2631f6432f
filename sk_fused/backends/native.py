"""The C++ extension: csrc/library.cpp lists the operators, csrc/cpu and csrc/cuda have the kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import fake, native_on_cuda

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
    y = branches[0]
    if y.is_cuda:
        reason = native_on_cuda.why_not(y.device, len(branches))
        if reason:
            return reason
    elif not y.is_cpu:
        return f"the native kernels run on a CPU or a CUDA device, the branches are on {y.device}"
    if y.dtype not in DTYPES:
        return f"the native kernels take float32, float64, bfloat16 and float16, the branches are {y.dtype}"
    if y.shape[0] == 0:
        return "the native kernels take at least one image, the batch is empty"
    return None


def why_not_convolve(
    shape: torch.Size, dtype: torch.dtype, weights: Sequence[torch.Size], stride: int, dilations: Sequence[int], groups: int, on_cuda: bool, graph: bool
) -> str | None:
    """The reason why convolutions of an x of this shape and dtype, on a CUDA device or a CPU, are left to PyTorch, or None."""
    inputs, outputs, M = weights[0][1], weights[0][0] // groups, len(weights)
    if any(w != (groups * outputs, inputs, 3, 3) for w in weights) or shape[1] not in (groups * inputs, M * groups * inputs):
        return f"the native convolutions are 3 × 3 of one input or of its parts, got weights {[tuple(w) for w in weights]} for {shape[1]} channels"
    if M > 8 or not all(1 <= d <= 3 for d in dilations):
        return f"the native convolutions have at most 8 branches and dilations from 1 to 3, got {M} and {list(dilations)}"
    if on_cuda:
        return native_on_cuda.why_not_convolve(shape, dtype, inputs, outputs, groups, stride, graph)
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
    # All steps, forward and backward, in one call: functional._SelectiveKernel.
    selective_kernel = _C.selective_kernel

    def _operator(fake_impl: Callable) -> Callable:
        """The operator of the same name, which gets this one for its fake."""
        torch.library.register_fake(f"sk_fused::{fake_impl.__name__}", fake_impl)
        return getattr(torch.ops.sk_fused, fake_impl.__name__).default

    branch_statistics = _operator(fake.branch_statistics)
    branch = _operator(fake.branch)
    squeeze = _operator(fake.squeeze(lambda ys, sums: len(ys)))
    attend = _operator(fake.attend)
    select = _operator(fake.select)
    unit = _operator(fake.unit)
    select_backward_sums = _operator(fake.select_backward_sums)
    attend_backward = _operator(fake.attend_backward)
    fold_backward = _operator(fake.fold_backward)
    select_backward = _operator(fake.select_backward)
    branch_backward = _operator(fake.branch_backward(lambda x: torch.contiguous_format))
