"""Matmul of expert-sorted rows with one weight per expert."""
