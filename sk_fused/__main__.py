"""`python -m sk_fused`: what a bug report needs."""

import platform
from importlib import metadata

import torch

from . import __version__
from .backends import BACKENDS, native


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    print(f"sk_fused {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(", ".join(f"{package} {_version(package)}" for package in ("torch", "triton", "timm", "numpy")))
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        title = torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}"
        print(f"{device}: {title}")
        for name, backend in BACKENDS.items():
            print(f"  {name}: {backend.why_not([torch.empty(1, 1, 1, 1, device=device)]) or 'yes'}")
    if native._C is not None:
        print(f"architectures of the native CUDA kernels: {native._C.cuda_architectures or 'none, the extension was built without nvcc'}")
        print(f"instruction set of the native CPU kernels: {native._C.instruction_set()}")


if __name__ == "__main__":
    main()
