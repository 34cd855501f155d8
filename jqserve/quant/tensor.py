"""`QuantizedTensor`: a packed weight as a JAX pytree, and `dequantize`, the oracle of every kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jqserve.quant import codebook
from jqserve.quant.packing import unpack_uint4
from jqserve.quant.spec import IMPLIED_ZERO, QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix W [N, K] kept packed; every array has N first, so fusing and column sharding cut axis 0.

    qvalue       canonical: [N, K] (8-bit types), or uint8 [N, ceil(K/2)] (4-bit types, low nibble = even k)
    scale        canonical: [ceil(N/gn), ceil(K/gk)], float16 | bfloat16 | float32
    zero_point   None, or of the scale's shape: uint8 (spec.zero "int") or float (spec.zero "offset")
    perm         None, or int32 [K]: the columns stored are W[:, perm] (act-order, sorted by group once), so a
                 matmul takes x[..., perm]
    input_scale  None, or float32 [1, 1]: the static scale of the input
    spec         static metadata; see QuantSpec for the arithmetic
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    perm: jax.Array | None
    input_scale: jax.Array | None
    spec: QuantSpec = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix, whatever the packing."""
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self))

    def replace(self, **changes: Any) -> QuantizedTensor:
        return dataclasses.replace(self, **changes)


def dequantize(tensor: QuantizedTensor, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix W [N, K] in its original column order; arithmetic in float32, rounded to `dtype` once, at the end.

    Raises ValueError for a kernel layout: bring the tensor back with `jqserve.ops.relayout.to_canonical` first.
    """
    spec = tensor.spec
    if spec.layout != "canonical":
        raise ValueError(f"dequantize needs the canonical layout, this tensor has {spec.layout!r}; use to_canonical")
    n, k = spec.shape
    gn, gk = spec.group_shape
    q = unpack_uint4(tensor.qvalue, k) if spec.bits == 4 else tensor.qvalue

    def spread(grid: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(grid.astype(jnp.float32), gn, axis=0)[:n], gk, axis=1)[:, :k]

    value = codebook.decode(q, spec.qtype) if spec.codebook else q.astype(jnp.float32)
    if spec.zero == "int":
        assert tensor.zero_point is not None
        value = value - spread(tensor.zero_point)
    elif not spec.codebook:
        value = value - IMPLIED_ZERO[spec.qtype]
    value = value * spread(tensor.scale)
    if spec.zero == "offset":
        assert tensor.zero_point is not None
        value = value + spread(tensor.zero_point)
    if tensor.perm is not None:
        value = value[:, jnp.argsort(tensor.perm)]
    return value.astype(dtype)
