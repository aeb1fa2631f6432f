"""A pytest plugin: the operators of CPU tensors are those of csrc/cuda, run on the host."""

import os

import torch

import sk_fused.backends.native  # noqa: F401

torch.ops.load_library(os.environ["CUDA_ON_HOST_LIBRARY"])
