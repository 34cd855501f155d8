"""Logits and greedy continuations of a plain model, as `reference.py` makes them, without compressed-tensors."""

from __future__ import annotations

import numpy as np
import torch

LENGTHS = (33, 17, 9, 5)
GREEDY_STEPS = 16


@torch.no_grad()
def outputs(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [S, V], and ids and margins [16] of the greedy continuation, each step from the whole sequence."""
    ids = torch.tensor(prompt, dtype=torch.long)[None]
    logits = model(ids, use_cache=False).logits[0].numpy()
    greedy, margins = [], []
    for _ in range(GREEDY_STEPS):
        top = torch.topk(model(ids, use_cache=False).logits[0, -1], 2)
        greedy.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        ids = torch.cat([ids, top.indices[:1][None]], dim=1)
    return logits, np.array(greedy, np.int32), np.array(margins, np.float32)
