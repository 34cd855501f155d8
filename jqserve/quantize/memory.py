"""What quantizing takes of the device's memory."""

from __future__ import annotations

from jqserve.models.config import ModelConfig


def memory_bound(config: ModelConfig, tokens: int, width: int) -> int:
    """Bytes that the design allows: one layer's weights and three matrices of its largest K, all float32, and what a
    chunk takes at its widest (the residual stream, gate and up and their product, in and out).

    tokens    in a chunk
    width     bytes of an activation
    """
    d, f = config.hidden_size, config.ffn_size
    weights = 4 * ((2 * config.heads + 2 * config.kv_heads) * config.head_dim * d + 3 * d * f)
    return weights + 3 * 4 * f * f + tokens * (4 * d + 4 * f) * width
