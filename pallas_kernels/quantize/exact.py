"""Arithmetic that Pallas does not reach, for the quantization kernels on NVIDIA GPUs.

A quantized value is y / scale rounded to int8 or fp8, and the reference divides exactly. Mosaic GPU's own division is
`div.full`, off by up to 2 ulp. Here r = 1 / scale is the hardware's approximation with one Newton step, q0 = y * r, and
q = q0 + (y - q0 * scale) * r with fused multiply-adds (Markstein, IBM J. Res. Dev. 34(1), 1990): the remainder is
exact, so that q is the quotient rounded once, as long as nothing underflows on the way: `lift` sees to that. Elements
that share a scale share r, which leaves three instructions an element.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

SCALAR = plgpu.Layout.WG_SPLAT(())  # `layout` of a number
TINY = 2.0**-100  # remainders of quotients down to 2^-24 by a scale above this are exact (float32 ends at 2^-149)
LIFT = 2.0**64


def lift(scale: jax.Array) -> jax.Array:
    """1, or 2^64 where scale is so small that its reciprocal or a remainder leaves float32: multiply both by it."""
    return jnp.where(scale < TINY, jnp.float32(LIFT), jnp.float32(1))


def divide(y: jax.Array, scale: jax.Array, layout: Any) -> jax.Array:
    """y / scale, rounded once: float32 arrays of one shape in `layout`, scale from 2^-100 to 2^126 (or NaN).

    An infinite scale gives NaN. Does not run in interpret mode.
    """
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, math

    @plgpu.inline_mgpu(
        arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(y.shape, jnp.float32, layout=layout)
    )
    def quotient(ctx: Any, y: Any, scale: Any) -> Any:
        approximate = y._lift_fast_instr("rcp.approx.ftz.f32")

        def one(y: Any, s: Any) -> Any:
            unit: Any = ir.FloatAttr.get(ir.F32Type.get(), 1.0)
            if isinstance(s.type, ir.VectorType):
                unit = ir.DenseElementsAttr.get_splat(s.type, unit)
            negative, rough = arith.negf(s), approximate(s)
            r = math.fma(math.fma(negative, rough, arith.constant(s.type, unit)), rough, rough)
            first = arith.mulf(y, r)
            return math.fma(math.fma(negative, first, y), r, first)

        return y._pointwise(one, scale)

    return quotient(y, scale)


def reciprocal(scale: jax.Array, layout: Any) -> jax.Array:
    """1 / scale to 1 ulp, at most 2^126: one multiplication an element instead of `divide`'s three and `lift`'s.

    For fp8 behind float32 arithmetic of its own (SiLU, RMSNorm) only: y * r is within 2 ulp of the quotient, which
    crosses an edge between two codes in about 2^-19 of values; 3 ulp of the sigmoid do so as often. Rows whose largest
    magnitude is below 2^-126 of the divisor get codes that are too small. Does not run in interpret mode.
    """
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, math

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(scale.shape, jnp.float32, layout=layout))
    def inverse(ctx: Any, scale: Any) -> Any:
        approximate = scale._lift_fast_instr("rcp.approx.ftz.f32")

        def one(s: Any) -> Any:
            unit: Any = ir.FloatAttr.get(ir.F32Type.get(), 1.0)
            if isinstance(s.type, ir.VectorType):
                unit = ir.DenseElementsAttr.get_splat(s.type, unit)
            rough = approximate(s)
            return math.fma(math.fma(arith.negf(s), rough, arith.constant(s.type, unit)), rough, rough)

        return scale._pointwise(one)

    return inverse(jnp.maximum(scale, 2.0**-126))


def widen(x: jax.Array, layout: Any) -> jax.Array:
    """x in float32: one instruction a bfloat16 (the compiler takes a permutation and a shift for the upper half)."""
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
    def wide(ctx: Any, x: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

        def one(v: Any) -> Any:
            count = v.type.shape[0] // 2
            words = vector.bitcast(ir.VectorType.get((count,), i32), v)
            shift, mask = arith.constant(i32, 16), arith.constant(i32, -65536)
            halves = []
            for i in range(count):
                word = vector.extract(words, dynamic_position=[], static_position=[i])
                halves += [arith.shli(word, shift), arith.andi(word, mask)]
            return vector.from_elements(
                ir.VectorType.get((2 * count,), f32), [arith.bitcast(f32, half) for half in halves]
            )

        return x._pointwise(one)

    return wide(x)


def divide_by(y: jax.Array, divisor: float, layout: Any) -> jax.Array:
    """y / divisor, rounded once; y in `layout`."""
    constant = lax.broadcast_in_dim(jnp.float32(divisor), y.shape, [])
    return divide(y, constant if y.ndim == 0 else plgpu.layout_cast(constant, layout), layout)


def sigmoid(x: jax.Array, layout: Any) -> jax.Array:
    """1 / (1 + e^-x) to 3 ulp, 2e-19 below x = -43; two neighbours share one reciprocal. Not for interpret mode.

    The special function unit makes 16 results a clock and multiprocessor: with an exponential and a reciprocal each,
    the 14336 elements of one row kept it busy for 1 us. 1/a = b / (ab) and 1/b = a / (ab) take half of the reciprocals.
    The exponent is bounded so that ab and its reciprocal are normal numbers (e^86 < 2^126); a NaN spreads to its
    neighbour, in a row that is NaN anyway.
    """
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout))
    def reciprocal(ctx: Any, x: Any) -> Any:
        approximate = x._lift_fast_instr("rcp.approx.ftz.f32")

        def one(v: Any) -> Any:
            if not isinstance(v.type, ir.VectorType) or v.type.shape[0] % 2:
                return approximate(v)
            result = v
            for i in range(0, v.type.shape[0], 2):
                a, b = (vector.extract(v, dynamic_position=[], static_position=[i + j]) for j in range(2))
                r = approximate(arith.mulf(a, b))
                for j, other in enumerate((b, a)):
                    result = vector.insert(arith.mulf(r, other), result, dynamic_position=[], static_position=[i + j])
            return result

        return x._pointwise(one)

    return reciprocal(1.0 + jnp.exp(jnp.minimum(-x, 43.0)))


def cluster_fence() -> None:
    """Orders this thread's accesses to its peers' shared memory around a cluster barrier, whose arrivals do not."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    @plgpu.inline_mgpu()
    def fence(ctx: Any) -> None:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "fence.acq_rel.cluster;", "", has_side_effects=True)

    fence()
