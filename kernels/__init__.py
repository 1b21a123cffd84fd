"""Triton kernels; installed as ``fino_fast.kernels``."""
