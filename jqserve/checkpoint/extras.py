"""Tensors that a checkpoint may have beyond the model's own: the short list, each with its reason and its test."""

from __future__ import annotations

import dataclasses
import logging
import re

import numpy as np

from jqserve.checkpoint.open import AnyCheckpoint
from jqserve.errors import CheckpointError
from jqserve.models.config import ModelConfig

log = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LINEAR = r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_ROTARY = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_BIAS = re.compile(_LINEAR + r"\.bias|lm_head\.bias")
_G_IDX = re.compile(_LINEAR + r"\.(weight_)?g_idx")
_KV_SCALE = re.compile(
    r"model\.layers\.\d+\.self_attn\.(attn\.)?(kv_scale|[kv]_scale|[kv]_proj\.(output_scale|[kv]_scale))"
)
#: Rows of the embedding and of its copy that are compared at a time.
_CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Extra:
    """A tensor that is left out, and why that is harmless. `check_values`: its numbers must prove it."""

    name: str
    reason: str
    check_values: bool = False


def classify(checkpoint: AnyCheckpoint, config: ModelConfig, left: list[str]) -> tuple[Extra, ...]:
    """Names that no module claimed -> extras. Raises CheckpointError naming the tensors that are on no list."""
    extras, unknown = [], []
    for name in left:
        layer = _LAYER.match(name)
        if layer and (len(layer[1]) > 9 or int(layer[1]) >= config.layers):
            unknown.append(name)
        elif _ROTARY.fullmatch(name):
            extras.append(Extra(name, "rotary frequencies are computed from the config"))
        elif _BIAS.fullmatch(name):
            extras.append(Extra(name, "an all-zero bias of a Linear without bias", check_values=True))
        elif _G_IDX.fullmatch(name):
            extras.append(Extra(name, "a group index that is -1 throughout", check_values=True))
        elif name == HEAD and config.tied_embeddings:
            extras.append(Extra(name, "a copy of the tied embedding", check_values=True))
        elif _KV_SCALE.fullmatch(name):
            extras.append(Extra(name, "a KV cache scale: --activations none"))
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        raise CheckpointError(
            f"{checkpoint.file_of(unknown[0])}: {len(unknown)} tensors belong to no module of {config.architecture} "
            f"with {config.layers} layers as config.json describes it: {', '.join(unknown[:6])}{more}. Nothing is "
            "dropped in silence: correct config.json, or remove the tensors"
        )
    return tuple(extras)


def verify(checkpoint: AnyCheckpoint, extras: tuple[Extra, ...]) -> None:
    """Reads those extras whose values must prove them harmless, then logs each kind once.

    Raises CheckpointError naming the tensor and what it holds instead.
    """
    for extra in extras:
        if extra.check_values:
            _verify(checkpoint, extra.name)
    for reason in dict.fromkeys(e.reason for e in extras):
        names = [e.name for e in extras if e.reason == reason]
        log.info("left out: %s (%s)", ", ".join(names[:3]) + (f", ... {len(names)} in all" * (len(names) > 3)), reason)


def _verify(checkpoint: AnyCheckpoint, name: str) -> None:
    where = checkpoint.file_of(name)
    if name == HEAD:
        found, expected = checkpoint.entry(HEAD), checkpoint.entry(EMBEDDING)
        if found.dtype != expected.dtype or found.shape != expected.shape or not _equal(checkpoint):
            raise CheckpointError(
                f"{where}: {HEAD} differs from {EMBEDDING}, though config.json says tie_word_embeddings; set it to "
                "false if the head is a matrix of its own"
            )
        return
    values = checkpoint.read(name)
    if name.endswith("g_idx"):
        if not (values == -1).all():
            raise CheckpointError(f"{where}: {name} holds group indices, but config.json does not quantize this module")
    elif values.astype(np.float32).any():
        raise CheckpointError(
            f"{where}: {name} is not zero, but the model's config gives this Linear no bias (attention_bias, mlp_bias)"
        )


def _equal(checkpoint: AnyCheckpoint) -> bool:
    size = checkpoint.entry(HEAD).nbytes
    return all(
        np.array_equal(
            checkpoint.read_bytes(HEAD, begin, min(begin + _CHUNK_BYTES, size)),
            checkpoint.read_bytes(EMBEDDING, begin, min(begin + _CHUNK_BYTES, size)),
        )
        for begin in range(0, size, _CHUNK_BYTES)
    )
