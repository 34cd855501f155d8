"""A writer of .gguf files for tests, from the format's description: no product code."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}
NUMBERS |= {"BF16": 30, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
NUMBERS |= {"IQ4_XS": 23}  # of no size here: for refusals
FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SIZES = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
}
SIZES |= {"Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176)}
SIZES |= {"Q6_K": (256, 210)}
Tensor = tuple[str, tuple[int, ...], bytes]  # type, [N, K], data


def text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def value(found: Any) -> bytes:
    """type and value: bool, int (uint32), float (float32), str, or a list of one of them (int: int32)."""
    if isinstance(found, bool):
        return struct.pack("<I?", 7, found)
    if isinstance(found, int):
        return struct.pack("<II", 4, found)
    if isinstance(found, float):
        return struct.pack("<If", 6, found)
    if isinstance(found, str):
        return struct.pack("<I", 8) + text(found)
    kind, code = {str: (8, ""), float: (6, "f"), int: (5, "i")}[type(found[0])]
    body = b"".join(text(x) if kind == 8 else struct.pack("<" + code, x) for x in found)
    return struct.pack("<IIQ", 9, kind, len(found)) + body


def pack(fields: dict[str, Any], tensors: dict[str, Tensor], version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    head += b"".join(text(name) + value(found) for name, found in fields.items())
    body = b""
    for name, (kind, shape, data) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", NUMBERS[kind], len(body))
        body += data + bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + body


HIDDEN, FFN, HEADS, KV, VOCAB = 256, 512, 4, 2, 32
FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "general.file_type": 15,
}


def floats(rng: np.random.Generator, *shape: int, kind: str = "F32") -> Tensor:
    dtype = FLOATS[kind]
    return kind, shape, rng.normal(0, 0.1, shape).astype(dtype).tobytes()


def model(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """One layer whose matrices are floats, or random blocks of `kind`, repeated from tests/data/gguf_blocks."""
    rng = np.random.default_rng(seed)
    if kind not in FLOATS:
        raw = np.load(Path(__file__).parents[1] / "data" / "gguf_blocks" / "blocks.npz")[f"{kind}/raw"]
        block, width = SIZES[kind]
        blocks = raw.reshape(-1, width)

    def matrix(n: int, k: int) -> Tensor:
        if kind in FLOATS:
            return floats(rng, n, k, kind=kind)
        chosen = blocks[rng.integers(0, len(blocks), n * k // block)]
        return kind, (n, k), chosen.tobytes()

    kv = KV * HIDDEN // HEADS
    return {
        "token_embd.weight": floats(rng, VOCAB, HIDDEN, kind="F16"),
        "output_norm.weight": floats(rng, HIDDEN),
        "blk.0.attn_norm.weight": floats(rng, HIDDEN),
        "blk.0.ffn_norm.weight": floats(rng, HIDDEN),
        "blk.0.attn_q.weight": matrix(HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": matrix(kv, HIDDEN),
        "blk.0.attn_v.weight": matrix(kv, HIDDEN),
        "blk.0.attn_output.weight": matrix(HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": matrix(FFN, HIDDEN),
        "blk.0.ffn_up.weight": matrix(FFN, HIDDEN),
        "blk.0.ffn_down.weight": matrix(HIDDEN, FFN),
    }


def write(path: Path, kind: str = "Q4_0", fields: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    path.write_bytes(pack({**FIELDS, **(fields or {})}, {**model(kind), **tensors}))
    return path
