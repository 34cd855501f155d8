"""Row-wise ops between 16-bit matmuls, each one pass over memory."""
