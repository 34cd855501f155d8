"""rope_write on Hopper: program.py as a Mosaic GPU kernel, one block a token, the pages written in place.

In XLA the same takes three kernels (one for the queries, and a scatter each for keys and values), of 2 to 4 us each
where few tokens decode: a tenth of a batch-1 step of an 8-bit 8B model.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels.ahead import BLOCKS, Request, ask, spare_blocks
from pallas_kernels.paged_attention.simt import Mlir, Reg
from pallas_kernels.rope_write.program import UNIT, Problem, turn_and_write

_KINDS = {"bfloat16": "bf16", "float16": "f16"}
_NAMES = ("qkv", "cos", "sin", "slots", "k_scale", "v_scale", "k_pages", "v_pages", "q")


class Ops(Mlir):
    """The instructions of simt.py, and vector accesses at 64-bit addresses."""

    kind = "bf16"

    def pointer_at(self, name: str, row: Reg, row_bytes: int, offset: Reg) -> Reg:
        return self.offset_pointer(self.pointer(name, row, row_bytes), offset)

    def load_slot(self, token: Reg) -> Reg:
        return self._ptx("ld.global.b32 $0, [$1];", self.pointer("slots", token, 4), out=self.i32, effects=True)

    def load_words(self, pointer: Reg, offset: int, count: int) -> list[Reg]:
        assert count == 2
        text = f"ld.global.v2.b32 {{$0, $1}}, [$2 + {offset}];"
        return self._ptx(text, pointer, out=[self.i32] * 2, effects=True)

    def load_floats(self, pointer: Reg) -> list[Reg]:
        text = "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];"
        return self._ptx(text, pointer, out=[self.f32] * 4, effects=True)

    def store_words(self, pointer: Reg, offset: int, words: list[Reg]) -> None:
        self._ptx(f"st.global.v2.b32 [$0 + {offset}], {{$1, $2}};", pointer, *words, effects=True)

    def load_scale(self, name: str, index: Reg) -> Reg:
        return self._ptx("ld.global.f32 $0, [$1];", self.pointer(name, index, 4), out=self.f32, effects=True)

    def divide(self, x: Reg, y: Reg) -> Reg:
        return self._ptx("div.rn.f32 $0, $1, $2;", x, y, out=self.f32)

    def store_byte_quad(self, pointer: Reg, offset: int, values: list[Reg]) -> None:
        """Four f32 as float8_e4m3fn, clamped to +-448, round to nearest even."""
        convert = "cvt.rn.satfinite.e4m3x2.f32"
        text = f"{{ .reg .b16 lo, hi; .reg .b32 quad; {convert} lo, $2, $1; {convert} hi, $4, $3; "
        text += f"mov.b32 quad, {{lo, hi}}; st.global.b32 [$0 + {offset}], quad; }}"
        self._ptx(text, pointer, *values, effects=True)

    def unpack(self, word: Reg) -> tuple[Reg, Reg]:
        if self.kind == "bf16":
            return self.unpack_bf16(word)
        text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }"
        low, high = self._ptx(text, word, out=[self.f32, self.f32])
        return low, high

    def both(self, x: Reg, y: Reg) -> Reg:
        return Reg(arith.andi(x.value, y.value))


def problem(qkv: jax.Array, k_pages: jax.Array, threads: int, scales: int = 1) -> Problem:
    """The static description of a call, or NotImplementedError with what this kernel does not take."""
    pages, kv_heads, page_size, head_dim = k_pages.shape
    kind = _KINDS.get(str(qkv.dtype))
    fp8 = k_pages.dtype == jnp.float8_e4m3fn
    if kind is None or not (fp8 or k_pages.dtype == qkv.dtype):
        raise NotImplementedError(
            f"takes bf16 or f16 and pages of the same dtype or float8_e4m3fn, not {qkv.dtype} and {k_pages.dtype}"
        )
    if head_dim % (2 * UNIT):
        raise NotImplementedError(f"takes head dims that are multiples of {2 * UNIT}, not {head_dim}")
    if qkv.shape[0] == 0:
        raise NotImplementedError("takes no empty batch")
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    return Problem(heads, kv_heads, head_dim, page_size, pages, kind, threads, fp8, scales > 1)


@functools.lru_cache(maxsize=64)
def _kernel(p: Problem, rows: int, dtype: Any, request: Request | None) -> Any:
    spare = 0 if request is None else spare_blocks(rows)
    asking = None if request is None else ask(request, rows + spare)

    def rope_write(*refs: Any) -> None:
        if asking is not None:
            asking(refs[0])
            refs = refs[1:]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(_NAMES) + 1))
        def program(ctx: Any, *buffers: Any) -> None:
            del ctx
            ops = Ops(dict(zip(_NAMES, buffers)), buffers[-1])
            ops.kind = p.kind
            token, thread = ops.special("ctaid.x"), ops.special("tid.x")
            if spare:
                ops.when(token < rows, lambda: turn_and_write(ops, p, token, thread))
            else:
                turn_and_write(ops, p, token, thread)

        program(*refs)

    return plgpu.kernel(
        rope_write,
        out_type=jax.ShapeDtypeStruct((rows, p.heads, p.head_dim), dtype),
        scratch_types=[plgpu.SMEM((16,), jnp.int8)],  # unused: simt.py wants a buffer
        grid=(rows + spare,),
        grid_names=("token",),
        num_threads=p.threads // 128,
        thread_name="wg",
        kernel_name="rope_write_sm90",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def rope_write(qkv, cos, sin, slots, k_pages, v_pages, *, k_scale=None, v_scale=None, ahead=None):
    """See api.rope_write. `ahead`: see `pallas_kernels.ahead`; left out where there are many tokens."""
    if k_pages.dtype != jnp.float8_e4m3fn and not (k_scale is None and v_scale is None):
        raise NotImplementedError("takes scales with fp8 pages only")
    k_scale, v_scale = (jnp.asarray(1.0 if s is None else s, jnp.float32).reshape(-1) for s in (k_scale, v_scale))
    if k_scale.size != v_scale.size:
        k_scale, v_scale = (jnp.broadcast_to(s, k_pages.shape[1:2]) for s in (k_scale, v_scale))
    # Few tokens: all units of one at once, for latency; many: fewer threads a block, several blocks a multiprocessor.
    p = problem(qkv, k_pages, 512 if qkv.shape[0] <= 256 else 256, k_scale.size)
    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    request = None if ahead is None or qkv.shape[0] > BLOCKS else ahead.request()
    kernel = _kernel(p, qkv.shape[0], qkv.dtype, request)
    weight = [] if request is None else [ahead.weight]
    q = kernel(*weight, qkv, cos, sin, slots.astype(jnp.int32), k_scale, v_scale, k_ref, v_ref)
    return q, jax.freeze(k_ref), jax.freeze(v_ref)
