"""Writers: `Codes` to the tensors of a format and the `quantization_config` beside them (shared/FORMATS.md's bits)."""
