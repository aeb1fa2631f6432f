"""Fused kernels for the Selective Kernel (SK) unit of SKNet: a drop-in for timm's SelectiveKernel."""

from . import functional, reference
from .backends import use_backend
from .convert import fuse, unfuse
from .modules import FusedSelectiveKernel, FusedSelectiveKernelAttn

__version__ = "0.1.0"
__all__ = ["FusedSelectiveKernel", "FusedSelectiveKernelAttn", "functional", "fuse", "reference", "unfuse", "use_backend"]
