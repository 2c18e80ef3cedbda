"""Kernels in Triton, for GPUs and builds without the CUDA kernel of the same name.

Importing this package imports triton; nothing in tp_fused does so before it has to launch one of these.
"""
