"""What the CUDA half of the native backend takes."""

from collections.abc import Sequence

import torch


@torch.compiler.assume_constant_result
def why_not(device: torch.device, branches: int) -> str | None:
    """The reason why the kernels do not take so many branches on this device, or None."""
    # Where this is asked the extension is there; where the package is imported it may not be.
    from sk_fused import _C

    architectures = _C.cuda_architectures
    built = [int(architecture.rstrip("a")) for architecture in architectures.split()]
    if not built:
        return "the native extension was built without nvcc: it has no CUDA kernels"
    major, minor = torch.cuda.get_device_capability(device)
    if not any(architecture // 10 == major and architecture % 10 <= minor for architecture in built):
        return f"the native CUDA kernels are for the architectures {architectures}, the device has compute capability {major}.{minor}"
    if branches > 8:
        return f"the native CUDA kernels take at most 8 branches, got {branches}"
    return None


def why_not_convolve(
    shape: torch.Size, dtype: torch.dtype, weights: Sequence[torch.Size], stride: int, dilations: Sequence[int], groups: int, device: torch.device
) -> str | None:
    """As the backend's own."""
    return f"the native convolutions run on a CPU, the input is on {device}"
