"""w4a16: bf16/fp16 activations times weights packed in 4 bits."""
