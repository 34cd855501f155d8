"""Which kernels of a step ask for the weights of a later one meanwhile, and for how much of them."""

from __future__ import annotations

import jax

from jqserve.quant import QuantizedTensor
from pallas_kernels.ahead import PIECE as PIECE
from pallas_kernels.ahead import Ahead as Ahead

#: Bytes by the kernel that asks: "attn_norm" (for qkv), "rope" (o), "mlp_norm" (gate and up), "silu" (down). None of
#: them yet: it has been compiled and not timed, which `bench.ahead` does.
BYTES: dict[str, int] = {}


def read_ahead(kernel: str, weight: jax.Array | QuantizedTensor) -> Ahead | None:
    """What `kernel` should ask for, where `weight` [N, K] is multiplied after it."""
    size = BYTES.get(kernel, 0)
    return Ahead(weight.qvalue if isinstance(weight, QuantizedTensor) else weight, size, PIECE) if size else None
