"""Triton kernels of fastvq: tensors in, tensors out; no modules, no autograd."""
