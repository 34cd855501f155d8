"""The gated MLP: down(silu(gate(x)) * up(x)); gate and up fused into one matmul where their schemes agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jqserve.models.linear import Linear
from jqserve.ops.activations import QuantizedRows, fusible_activation, silu_mul, silu_mul_and_quantize
from jqserve.ops.ahead import read_ahead
from jqserve.quant import ActivationSpec


class MLP(nnx.Module):
    """`tree`: {"gate_up": LIN [2F, D] | "gate", "up": LIN [F, D], "down": LIN [D, F]}."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        names = ("gate_up",) if "gate_up" in tree else ("gate", "up")
        self.projections = nnx.List([Linear(tree[name]) for name in names])
        self.down = Linear(tree["down"])

    @property
    def input_scheme(self) -> ActivationSpec | None:
        return fusible_activation(*(p.matrix for p in self.projections))

    def __call__(self, x: jax.Array | QuantizedRows, *, fuse: bool) -> jax.Array:
        """x [..., D] -> [..., D]. `fuse`: one kernel makes the product, quantized if it may (x [T, D]; no gradient)."""
        parts = [projection(x) for projection in self.projections]
        scheme = fusible_activation(self.down.matrix) if fuse else None
        if scheme is not None:
            gate_up = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
            return self.down(silu_mul_and_quantize(gate_up, scheme=scheme, ahead=read_ahead("silu", self.down.matrix)))
        if fuse and len(parts) == 1:
            return self.down(silu_mul(parts[0], ahead=read_ahead("silu", self.down.matrix)))
        gate, up = jnp.split(parts[0], 2, axis=-1) if len(parts) == 1 else parts
        return self.down(jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up)
