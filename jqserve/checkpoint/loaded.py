"""`LoadedCheckpoint`, and the small types that every way of loading shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from jqserve.checkpoint.plan import LoadPlan
from jqserve.models.config import ModelConfig

Weight = Any  # jax.Array | np.ndarray | QuantizedTensor of them
Place = Callable[[Weight], Weight]
Progress = Callable[[int, int, str], None]  # modules done, modules in all, the path just done
Activations = Literal["config", "none"]


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """A model in memory.

    params: the canonical tree, nested dicts with str keys; [V, D] etc. are shapes, LIN is {"weight": array [N, K] or
    QuantizedTensor, "bias": [N] (optional)}:

        embed.weight [V, D]; final_norm.weight [D]; lm_head LIN (absent when tied); layers.<i> with
        attn_norm.weight [D], attn.qkv LIN (or q, k, v), attn.o LIN, attn.q_norm.weight and k_norm.weight [Dh] (qwen3),
        attn.k_scale and attn.v_scale float32 [] (an fp8 KV cache's), mlp_norm.weight [D],
        mlp.gate_up LIN (or gate, up), mlp.down LIN
    """

    config: ModelConfig  # dtype resolved
    params: dict[str, Any]
    plan: LoadPlan
    generation_config: dict[str, Any]


def keep_on_host(weight: Weight) -> Weight:
    """A `device_put` that leaves numpy arrays where they are."""
    return weight


def set_path(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts `leaf` under the dotted `path` of nested dicts."""
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def flat_leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Weight]]:
    """(dotted path, array or QuantizedTensor), the inverse of `set_path`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
