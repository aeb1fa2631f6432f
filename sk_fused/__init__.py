"""Fused kernels for the Selective Kernel (SK) unit of SKNet: a drop-in for timm's SelectiveKernel."""

import torch

from . import functional, reference
from .backends import use_backend
from .backends.fake import constant
from .convert import fuse, unfuse
from .modules import FusedSelectiveKernel, FusedSelectiveKernelAttn

# It is asked while torch.compile traces, which torch 2.11 cannot; the answer depends on the kind of device alone.
constant(torch.amp.is_autocast_available)

__version__ = "0.1.0"
__all__ = ["FusedSelectiveKernel", "FusedSelectiveKernelAttn", "functional", "fuse", "reference", "unfuse", "use_backend"]
