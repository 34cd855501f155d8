"""Problems shared by the tests and the bench."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; `op` "residual_rms_norm_quantize" is rms_norm_quantize with a residual; k is the output's width."""

    op: str
    m: int
    k: int
    qdtype: str = "float8_e4m3fn"
    block: int | None = None
    dtype: str = "bfloat16"

    @property
    def divisor(self) -> float:
        return 448.0 if self.qdtype == "float8_e4m3fn" else 127.0


OPS = ("quantize_rows", "rms_norm_quantize", "residual_rms_norm_quantize", "silu_mul_quantize")

CASES = (
    *(Case(op, 5, 1024, qdtype, block) for op in OPS for qdtype in ("int8", "float8_e4m3fn") for block in (None, 128)),
    *(Case(op, 3, 4096) for op in OPS),
    *(Case(op, 2, 14336, "int8") for op in OPS),
    *(Case(op, 4, 200, "int8", block) for op in OPS for block in (None, 128)),
    Case("quantize_rows", 4, 512, dtype="float16"),
    Case("quantize_rows", 4, 512, block=128, dtype="float32"),
    Case("quantize_rows", 0, 512),
    Case("silu_mul_quantize", 1, 384, block=128),
)
