"""What a quantized checkpoint is worth: perplexity, divergence from its base, tasks, errors by layer, speed."""
