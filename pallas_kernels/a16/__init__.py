"""Kernels shared by w4a16 and w8a16: 16-bit activations times packed weights."""
