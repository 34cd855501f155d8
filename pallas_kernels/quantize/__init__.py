"""Activation quantization to int8 / fp8, alone and fused with what produces the activation."""
