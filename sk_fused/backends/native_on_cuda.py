"""What the CUDA half of the native backend takes."""

import functools

import torch

import sk_fused.backends as backends

from .fake import constant


@constant
def why_not(device: torch.device, branches: int) -> str | None:
    """The reason why the kernels do not take so many branches on this device, or None."""
    if branches > 8:
        return f"the native CUDA kernels take at most 8 branches, got {branches}"
    return _why_not_device(device)


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    # Where this is asked the extension is there; where the package is imported it may not be.
    from sk_fused import _C

    architectures = _C.cuda_architectures
    built = [int(architecture.rstrip("a")) for architecture in architectures.split()]
    if not built:
        return "the native extension was built without nvcc: it has no CUDA kernels"
    major, minor = torch.cuda.get_device_capability(device)
    if not any(architecture // 10 == major and architecture % 10 <= minor for architecture in built):
        return f"the native CUDA kernels are for the architectures {architectures}, the device has compute capability {major}.{minor}"
    return None


def _faster_inputs(groups: int, stride: int) -> int:
    """Inputs of a group up to which the eval unit in one launch is taken for faster than the library's convolutions with the other passes:
    as measured on an H200 (benchmarks/results/nvidia-h200/notes.md), but for one group with stride 2. There x fits into shared memory
    for so few outputs at a time that most of a tile is multiplied in vain."""
    if groups > 1:
        return 8
    return 64 if stride == 1 else 0


# Pixels of a batch, and of a row, that the kernels of the eval unit can number, with the pixels of a tile to spare.
_MOST_PIXELS, _MOST_COLUMNS = 2**31 - 2**24, 2**17 - 1


def why_not_convolve(shape: torch.Size, dtype: torch.dtype, inputs: int, outputs: int, groups: int, stride: int, graph: bool) -> str | None:
    """The reason why 3 × 3 convolutions of an x of this shape, with so many channels of a group, in and out, are left to PyTorch, or
    None. Those that are taken are the eval unit's own, where it is faster or its backend is forced; where a graph is built, they
    are the library's in any case, of one copy of x for all branches."""
    small, C = inputs == outputs and inputs in (4, 8), groups * outputs
    taken = dtype in (torch.float16, torch.bfloat16) and stride in (1, 2) and C % 8 == 0 and C <= 8192 and (small or inputs % 16 == outputs % 8 == 0)
    if not taken:
        return (
            "the native convolutions on CUDA are for multiples of 16 channels in and of 8 out a group, or for 4 or 8 of both, a multiple of 8 and at most "
            f"8192 in all, with stride 1 or 2, in float16 or bfloat16; got {inputs} in, {outputs} out, {groups} groups, stride {stride}, {dtype}"
        )
    B, _, H, W = shape
    # Not asked where it would be a guard: a batch of any size, compiled or exported, must not be compared with a number.
    if not torch.compiler.is_compiling() and (B * H * W > _MOST_PIXELS or W > _MOST_COLUMNS):
        return f"the native convolutions on CUDA are for at most {_MOST_PIXELS} pixels, {_MOST_COLUMNS} in a row, got shape {tuple(shape)}"
    most = _faster_inputs(groups, stride)
    if inputs > most and not graph and backends._forced != "native":
        return f"of {inputs} inputs a group, more than {most} with stride {stride}, the library's convolutions are faster than the native eval unit, unless that is forced"
    return None
