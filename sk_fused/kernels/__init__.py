"""The Triton kernels, one file for each step; `common` has what they share. sk_fused/backends/triton.py makes operators of them."""
