"""w8a16: bf16/fp16 activations times int8, uint8 or fp8 weights."""
