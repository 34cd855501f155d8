"""The attention block: projections (fused or apart), optional q/k norm, rotary embedding; keys and values come and go
through the `attend` function that the caller passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jqserve.models.config import ModelConfig
from jqserve.models.linear import Linear
from jqserve.models.norm import RMSNorm
from jqserve.models.rope import rotate
from jqserve.ops.activations import QuantizedRows, fusible_activation
from jqserve.ops.ahead import Ahead, read_ahead
from jqserve.quant import ActivationSpec

Rope = tuple[jax.Array, jax.Array]  # cos, sin float32 [..., Dh/2]


@dataclasses.dataclass(frozen=True)
class Attend:
    """What the caller does with queries, keys and values; both forms return ([..., H, Dh], what the caller keeps).

    turned      takes q [..., H, Dh], k, v [..., Hkv, Dh], with the rotary embedding applied
    projection  takes the fused projection [..., (H + 2 Hkv) * Dh] as it is, the angles, and what to read ahead; None:
                there is no such form
    """

    turned: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
    projection: Callable[[jax.Array, Rope, Ahead | None], tuple[jax.Array, Any]] | None = None


class Attention(nnx.Module):
    """Grouped-query attention. `tree`: {"qkv": LIN | "q","k","v": LIN, "o": LIN, "q_norm","k_norm": {"weight"}?,
    "k_scale","v_scale": float32 []?}."""

    def __init__(self, config: ModelConfig, tree: Mapping[str, Any]) -> None:
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        names = ("qkv",) if "qkv" in tree else ("q", "k", "v")
        self.projections = nnx.List([Linear(tree[name]) for name in names])
        self.o = Linear(tree["o"])
        self.q_norm = RMSNorm(tree["q_norm"]["weight"], config.norm_eps) if "q_norm" in tree else None
        self.k_norm = RMSNorm(tree["k_norm"]["weight"], config.norm_eps) if "k_norm" in tree else None

        self.k_scale = nnx.Param(tree["k_scale"]) if "k_scale" in tree else None
        self.v_scale = nnx.Param(tree["v_scale"]) if "v_scale" in tree else None

    @property
    def kv_scales(self) -> dict[str, jax.Array]:
        """{"k_scale", "v_scale"} float32 [] of an fp8 KV cache, or nothing."""
        if self.k_scale is None or self.v_scale is None:
            return {}
        return {"k_scale": self.k_scale.get_value(), "v_scale": self.v_scale.get_value()}

    @property
    def input_scheme(self) -> ActivationSpec | None:
        """The activation scheme that the norm before may produce for all projections; see fusible_activation."""
        return fusible_activation(*(p.matrix for p in self.projections))

    def __call__(self, x: jax.Array | QuantizedRows, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        """x [..., D], rope = (cos, sin) [..., Dh/2] -> ([..., D], what `attend` kept)."""
        parts = [projection(x) for projection in self.projections]
        if len(parts) == 1 and attend.projection is not None and self.q_norm is None:
            out, kept = attend.projection(parts[0], rope, read_ahead("rope", self.o.matrix))
        else:
            if len(parts) == 1:
                widths = self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim
                parts = jnp.split(parts[0], widths, axis=-1)
            q, k, v = (part.reshape(*part.shape[:-1], -1, self.head_dim) for part in parts)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            out, kept = attend.turned(rotate(q, *rope), rotate(k, *rope), v)
        return self.o(out.reshape(*out.shape[:-2], self.heads * self.head_dim)), kept
