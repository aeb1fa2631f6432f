"""What the CUDA half of the native backend takes."""

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


def why_not_convolve(dtype: torch.dtype, inputs: int, outputs: int, groups: int, stride: int) -> str | None:
    """The reason why 3 × 3 convolutions of so many channels of a group, in and out, are left to PyTorch, or None."""
    return "the native convolutions run on a CPU, the input is on a CUDA device"
