"""What the kernels have to reach on one H200: microseconds a call, and who else was measured there."""

from __future__ import annotations

LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}
TINY = {"tiny": (256, 256)}
SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B, "tiny": TINY}  # name -> (N, K)

# Sum over the four 8B shapes.
MATMUL_BARS: dict[str, dict[int, float]] = {
    "w4a16": {1: 50, 16: 52, 64: 75, 256: 180, 4096: 2390},
    "fp8_row": {1: 66, 16: 66, 64: 68, 256: 100, 4096: 1195},
    "fp8_block": {1: 70, 16: 70, 64: 75, 256: 110, 4096: 1320},
    "int8_row": {1: 68, 16: 68, 64: 70, 256: 105, 4096: 1155},
    "w8a16": {1: 72, 16: 74, 64: 85, 256: 190, 4096: 2390},
}
# The kernels of others that do the same: (peer, scheme) prefixes of /work/shared/peers' script, and XLA's own.
PEERS_OF: dict[str, tuple[str, ...]] = {
    "w4a16": ("machete", "marlin_w4a16", "humming", "tinygemm"),
    "fp8_row": ("cutlass_scaled_mm_fp8_rowwise", "torch_scaled_mm", "cublaslt_scaled_mm", "xla_fp8"),
    "fp8_block": ("deepgemm",),
    "int8_row": ("cutlass_scaled_mm_w8a8_int8_rowwise", "torch_int_mm", "xla_int8"),
    "w8a16": ("marlin_w8a16",),
}
# What 4 bits are multiplied in besides symmetric groups of 128: at most 15 % over those.
OF_W4A16: dict[str, str] = {
    "w4a16_g64": "groups of 64",
    "w4a16_g32": "groups of 32",
    "w4a16_zero": "zero points (AWQ, asymmetric GPTQ)",
    "w4a16_offset": "float offsets (torchao's int4wo)",
    "w4a16_act_order": "act-order",
}
# (rows, context): bar in us, 32/8 heads of 128.
DECODE_BARS = {
    "bfloat16": {
        (1, 1024): 8.0,
        (8, 1024): 18.3,
        (64, 1024): 74.0,
        (256, 1024): 285.0,
        (1, 8192): 16.0,
        (8, 8192): 76.5,
        (64, 8192): 494.6,
        (256, 8192): 1930.0,
    },
    "float8_e4m3fn": {(64, 8192): 275.0, (256, 8192): 1100.0},
}
PREFILL_BARS = {"full": 680.0, "causal": 540.0}  # TFLOP/s at S = 4,096
QUANTIZE_SMALL_US = 2.5  # at M <= 64
QUANTIZE_LARGE_SHARE = 0.7  # of the HBM bandwidth at M >= 4,096
