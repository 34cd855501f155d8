"""Drawing the next token from logits: temperature, top-k, top-p, min-p and the draw, in one kernel."""
