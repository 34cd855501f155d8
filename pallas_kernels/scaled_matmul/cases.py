"""Problems shared by the tests, the bench and the tuner."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `scales`: "row" (x [M,1], w [N,1]), "tensor" ([1,1] both), "block" (1x128 by 128x128), "mixed"."""

    m: int
    n: int
    k: int
    qdtype: str = "float8_e4m3fn"
    scales: str = "row"
    bias: bool = False
    out_dtype: str = "bfloat16"


CASES = (
    Case(1, 256, 256),
    Case(1, 256, 256, "int8"),
    Case(16, 256, 512, "int8", bias=True),
    Case(16, 256, 512, bias=True, out_dtype="float32"),
    Case(5, 384, 640, scales="tensor"),
    Case(64, 256, 1024, out_dtype="float16"),
    Case(130, 256, 512),
    Case(130, 256, 512, "int8", scales="tensor"),
    Case(16, 256, 512, scales="block"),
    Case(33, 384, 640, scales="block", bias=True),
    Case(130, 256, 512, scales="block"),
    Case(8, 256, 256, "int8", scales="block"),
    Case(7, 256, 384, scales="mixed"),
    # Odd shapes: tails in N, K and in the blocks.
    Case(3, 200, 96, "int8"),
    Case(3, 200, 200, scales="block"),
    Case(9, 100, 48),
    Case(0, 256, 256),
)

# (N, K) of one Llama-3.1 layer; the bench's acceptance shapes and, for 70B, its further run.
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}
