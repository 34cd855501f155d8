"""Makes blocks.npz: random blocks of every ggml type and what the gguf package (0.19.0) decodes them to.

pip install gguf==0.19.0 numpy && python tests/data/gguf_blocks/make.py
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

ROWS, COLUMNS = 2, 512
#: Where a block's float16 scales stand: random bytes would make NaNs and infinities of them.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
rng, found = np.random.default_rng(0), {}
for name, places in HALVES.items():
    kind = gguf.GGMLQuantizationType[name]
    block, width = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (ROWS, COLUMNS // block, width), dtype=np.uint8)
    for place in places:
        halves = rng.uniform(-0.02, 0.02, raw.shape[:2]).astype(np.float16)
        raw[:, :, place : place + 2] = halves[..., None].view(np.uint8)
    found[f"{name}/raw"] = raw.reshape(ROWS, -1)
    found[f"{name}/value"] = gguf.dequantize(found[f"{name}/raw"], kind)
np.savez_compressed(Path(__file__).parent / "blocks.npz", **found)
