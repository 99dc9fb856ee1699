"""From tensors to the launchers of csrc/: pointers, strides, the stream. One op one basename, as in every folder.

A module offers the steps that ``fastpeft.ops`` asks of a backend; those without a CUDA kernel are the Triton kernels'.
"""
