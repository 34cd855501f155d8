"""8-bit times 8-bit matmul with scales applied to the accumulator."""
