"""One file a format: what its config says about each Linear, which tensors it stores, and how they decode."""
