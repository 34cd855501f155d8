"""Offline quantizers in JAX: a dense Hugging Face checkpoint in, a quantized one that other engines read out."""
