"""Arithmetic of our own: products, attention and norms in C, for CPUs, and in Triton, for GPUs; weights in other layouts; CUDA graphs.

Tensors go in, tensors come out. Called by `base/`, whose modules keep the weights, and by `streams/` and `drafting/`.
"""
