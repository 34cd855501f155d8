"""The instructions that the warp programs of this folder use, emitted as MLIR inside a Mosaic GPU kernel.

A warp program (decode_warp.py) is written once against this small instruction set: values are 32-bit registers of one
thread, with Python operators. `Mlir` emits them through `plgpu.inline_mgpu`; `simt_numpy.Numpy` executes the same
program on 32-lane numpy arrays, which is how the fragment layouts are tested on a machine without a GPU (Mosaic's
interpreter knows neither mma.sync nor cp.async).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf


class Reg:
    """One register: i32, i64, i1 or f32."""

    __slots__ = ("value",)

    def __init__(self, value: ir.Value):
        self.value = value

    @property
    def is_float(self) -> bool:
        return isinstance(self.value.type, ir.F32Type)

    def _other(self, x: Reg | int | float) -> ir.Value:
        if isinstance(x, Reg):
            return x.value
        return arith.constant(self.value.type, float(x) if self.is_float else int(x))

    def _op(self, x: Any, integer: Any, floating: Any = None) -> Reg:
        return Reg((floating if self.is_float else integer)(self.value, self._other(x)))

    def __add__(self, x: Any) -> Reg:
        return self._op(x, arith.addi, arith.addf)

    def __sub__(self, x: Any) -> Reg:
        return self._op(x, arith.subi, arith.subf)

    def __mul__(self, x: Any) -> Reg:
        return self._op(x, arith.muli, arith.mulf)

    def __floordiv__(self, x: Any) -> Reg:
        return self._op(x, arith.divui)

    def __mod__(self, x: Any) -> Reg:
        return self._op(x, arith.remui)

    def __and__(self, x: Any) -> Reg:
        return self._op(x, arith.andi)

    def __or__(self, x: Any) -> Reg:
        return self._op(x, arith.ori)

    def __xor__(self, x: Any) -> Reg:
        return self._op(x, arith.xori)

    def __lshift__(self, x: Any) -> Reg:
        return self._op(x, arith.shli)

    def __rshift__(self, x: Any) -> Reg:
        return self._op(x, arith.shrui)

    def _compare(self, x: Any, integer: Any, floating: Any) -> Reg:
        if self.is_float:
            return Reg(arith.cmpf(floating, self.value, self._other(x)))
        return Reg(arith.cmpi(integer, self.value, self._other(x)))

    def __lt__(self, x: Any) -> Reg:
        return self._compare(x, arith.CmpIPredicate.slt, arith.CmpFPredicate.OLT)

    def __ge__(self, x: Any) -> Reg:
        return self._compare(x, arith.CmpIPredicate.sge, arith.CmpFPredicate.OGE)

    def equals(self, x: Any) -> Reg:
        return self._compare(x, arith.CmpIPredicate.eq, arith.CmpFPredicate.OEQ)


class Mlir:
    """Emits instructions at MLIR's current insertion point. `smem` is the CTA's byte buffer (a memref)."""

    def __init__(self, buffers: dict[str, ir.Value], smem: ir.Value):
        self.i32 = ir.IntegerType.get_signless(32)
        self.i64 = ir.IntegerType.get_signless(64)
        self.f32 = ir.F32Type.get()
        self.base = {
            name: Reg(llvm.ptrtoint(self.i64, utils.memref_ptr(ref)))
            for name, ref in buffers.items()
            if ref is not None
        }
        self.smem_base = Reg(llvm.ptrtoint(self.i32, utils.memref_ptr(smem)))

    def _ptx(self, text: str, *args: Reg, out: Any = None, effects: bool = False, convergent: bool = False) -> Any:
        values = [a.value for a in args]
        got = utils.inline_ptx(text, *values, result_types=out, has_side_effects=effects, convergent=convergent)
        if out is None:
            return None
        return Reg(got) if isinstance(out, ir.Type) else [Reg(v) for v in got]

    # constants, arithmetic
    def const_i32(self, x: int) -> Reg:
        return Reg(arith.constant(self.i32, x))

    def const_f32(self, x: float) -> Reg:
        return Reg(arith.constant(self.f32, x))

    def select(self, condition: Reg, x: Reg, y: Reg) -> Reg:
        return Reg(arith.select(condition.value, x.value, y.value))

    def both(self, x: Reg, y: Reg) -> Reg:
        return Reg(arith.andi(x.value, y.value))

    def either(self, x: Reg, y: Reg) -> Reg:
        return Reg(arith.ori(x.value, y.value))

    def min_int(self, x: Reg, y: int) -> Reg:
        return Reg(arith.minsi(x.value, arith.constant(self.i32, y)))

    def max_int(self, x: Reg, y: int) -> Reg:
        return Reg(arith.maxsi(x.value, arith.constant(self.i32, y)))

    def max(self, x: Reg, y: Reg) -> Reg:
        return self._ptx("max.f32 $0, $1, $2;", x, y, out=self.f32)

    def fma(self, x: Reg, y: Reg, z: Reg) -> Reg:
        return self._ptx("fma.rn.f32 $0, $1, $2, $3;", x, y, z, out=self.f32)

    def exp2(self, x: Reg) -> Reg:
        return self._ptx("ex2.approx.ftz.f32 $0, $1;", x, out=self.f32)

    def reciprocal(self, x: Reg) -> Reg:
        return self._ptx("rcp.approx.ftz.f32 $0, $1;", x, out=self.f32)

    def pack(self, low: Reg, high: Reg, kind: str) -> Reg:
        """Two f32 -> bf16x2 or f16x2, round to nearest even."""
        return self._ptx(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", high, low, out=self.i32)

    def unpack_bf16(self, x: Reg) -> tuple[Reg, Reg]:
        low = Reg(arith.bitcast(self.f32, (x << 16).value))
        return low, Reg(arith.bitcast(self.f32, (x & -65536).value))

    def fp8_to_f16(self, x: Reg, kind: str) -> tuple[Reg, Reg]:
        """Four fp8 -> (f16x2 of bytes 0, 1; f16x2 of bytes 2, 3)."""
        text = (
            "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; "
            f"cvt.rn.f16x2.{kind}x2 $0, lo; cvt.rn.f16x2.{kind}x2 $1, hi; }}"
        )
        low, high = self._ptx(text, x, out=[self.i32, self.i32])
        return low, high

    def permute(self, x: Reg, selector: int) -> Reg:
        return self._ptx(f"prmt.b32 $0, $1, $1, {selector:#x};", x, out=self.i32)

    # warp
    def shuffle_xor(self, x: Reg, distance: int) -> Reg:
        return Reg(utils.shfl_bfly(x.value, distance))

    def sync_warp(self) -> None:
        self._ptx("bar.warp.sync 0xffffffff;", convergent=True)

    def ldmatrix(self, address: Reg, *, transpose: bool) -> list[Reg]:
        trans = ".trans" if transpose else ""
        text = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
        return self._ptx(text, address, out=[self.i32] * 4, effects=True, convergent=True)

    def movmatrix(self, x: Reg) -> Reg:
        return self._ptx("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", x, out=self.i32, convergent=True)

    def mma(self, c: Sequence[Reg], a: Sequence[Reg], b: Sequence[Reg], kind: str) -> list[Reg]:
        """m16n8k16: c + a @ b, f32 accumulators."""
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        return self._ptx(text, *a, *b, *c, out=[self.f32] * 4, convergent=True)

    # memory
    def load_global(self, name: str, offset: Reg) -> Reg:
        """32 bits at byte `offset` (below 2^31) of a buffer that this kernel does not write."""
        wide = Reg(arith.extui(self.i64, offset.value))
        return self._ptx("ld.global.nc.b32 $0, [$1];", self.base[name] + wide, out=self.i32)

    def load_global_f32(self, name: str, offset: Reg) -> Reg:
        return Reg(arith.bitcast(self.f32, self.load_global(name, offset).value))

    def pointer(self, name: str, index: Reg, size: int) -> Reg:
        """Address of element `index` of `size` bytes; 64-bit, since a pool exceeds 4 GiB."""
        return self.base[name] + Reg(arith.extui(self.i64, index.value)) * size

    def offset_pointer(self, pointer: Reg, offset: Reg) -> Reg:
        return pointer + Reg(arith.extui(self.i64, offset.value))

    def copy_async(self, address: Reg, pointer: Reg, offset: int, size: Reg) -> None:
        """16 bytes global -> shared, of which the bytes past `size` (0 or 16) are zeros and not read."""
        self._ptx(
            f"cp.async.cg.shared.global.L2::128B [$0], [$1 + {offset}], 16, $2;", address, pointer, size, effects=True
        )

    def commit(self) -> None:
        self._ptx("cp.async.commit_group;", effects=True)

    def wait(self, pending: int) -> None:
        self._ptx(f"cp.async.wait_group {pending};", effects=True)

    def store_shared(self, address: Reg, x: Reg, where: Reg | None = None) -> None:
        predicate = None if where is None else where.value
        utils.inline_ptx("st.shared.f32 [$0], $1;", address.value, x.value, predicate=predicate)

    def load_shared(self, address: Reg) -> Reg:
        return self._ptx("ld.shared.f32 $0, [$1];", address, out=self.f32, effects=True)

    def load_shared4(self, address: Reg) -> list[Reg]:
        return self._ptx("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", address, out=[self.f32] * 4, effects=True)

    def store_shared4(self, address: Reg, x: Sequence[Reg]) -> None:
        self._ptx("st.shared.v4.f32 [$0], {$1, $2, $3, $4};", address, *x, effects=True)

    def load_shared_words(self, address: Reg) -> list[Reg]:
        return self._ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address, out=[self.i32] * 4, effects=True)

    def store_shared_words(self, address: Reg, x: Sequence[Reg]) -> None:
        self._ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", address, *x, effects=True)

    def peer_address(self, address: Reg, rank: Reg) -> Reg:
        return self._ptx("mapa.shared::cluster.u32 $0, $1, $2;", address, rank, out=self.i32)

    def load_peer(self, address: Reg) -> Reg:
        return self._ptx("ld.shared::cluster.f32 $0, [$1];", address, out=self.f32, effects=True)

    def load_peer4(self, address: Reg) -> list[Reg]:
        text = "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [$4];"
        return self._ptx(text, address, out=[self.f32] * 4, effects=True)

    def store_global2(self, name: str, offset: Reg, x: Reg, y: Reg) -> None:
        wide = Reg(arith.extui(self.i64, offset.value))
        self._ptx("st.global.v2.b32 [$0], {$1, $2};", self.base[name] + wide, x, y, effects=True)

    def store_global4(self, name: str, offset: Reg, x: Sequence[Reg]) -> None:
        wide = Reg(arith.extui(self.i64, offset.value))
        self._ptx("st.global.v4.f32 [$0], {$1, $2, $3, $4};", self.base[name] + wide, *x, effects=True)

    def load_global4(self, name: str, offset: Reg) -> list[Reg]:
        """Of a buffer that other CTAs write, behind `wait_acquire`."""
        wide = Reg(arith.extui(self.i64, offset.value))
        text = "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];"
        return self._ptx(text, self.base[name] + wide, out=[self.f32] * 4, effects=True)

    def store_release(self, name: str, offset: Reg, x: Reg) -> None:
        wide = Reg(arith.extui(self.i64, offset.value))
        self._ptx("st.release.gpu.global.b32 [$0], $1;", self.base[name] + wide, x, effects=True)

    def wait_acquire(self, name: str, offset: Reg) -> None:
        """Until the word is not zero."""
        wide = Reg(arith.extui(self.i64, offset.value))
        text = (
            "{ .reg .pred p; .reg .b32 f; WAIT_${:uid}: ld.acquire.gpu.global.b32 f, [$0]; setp.ne.b32 p, f, 0; "
            "@p bra DONE_${:uid}; nanosleep.u32 100; bra WAIT_${:uid}; DONE_${:uid}: }"
        )
        self._ptx(text, self.base[name] + wide, effects=True)

    def any_lane(self, x: Reg) -> Reg:
        """Whether the condition `x` holds in some lane of the warp."""
        text = "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.s32 $0, 1, 0, q; }"
        flag = self._ptx(text, Reg(arith.extui(self.i32, x.value)), out=self.i32, effects=True, convergent=True)
        return flag.equals(1)

    # control
    def barrier(self) -> None:
        self._ptx("bar.sync 0;", effects=True, convergent=True)

    def cluster_barrier(self) -> None:
        self._ptx("barrier.cluster.arrive.release.aligned;", effects=True, convergent=True)
        self._ptx("barrier.cluster.wait.acquire.aligned;", effects=True, convergent=True)

    def special(self, name: str, again: bool = False) -> Reg:
        """`again`: read where it is used; the compiler keeps it in a register otherwise, or spills it."""
        return self._ptx(f"mov.u32 $0, %{name};", out=self.i32, effects=again)

    def uniform(self, x: Reg) -> Reg:
        """Tells ptxas that all lanes hold the same value."""
        return Reg(utils._warp_bcast(x.value))

    def when(self, condition: Reg, body: Callable[[], None]) -> None:
        with ir.InsertionPoint(scf.IfOp(condition.value).then_block):
            body()
            scf.yield_([])

    def loop(self, count: Reg, carry: list[Reg], body: Callable[[Reg, list[Reg]], list[Reg]]) -> list[Reg]:
        zero, one = arith.constant(self.i32, 0), arith.constant(self.i32, 1)
        loop = scf.ForOp(zero, count.value, one, [c.value for c in carry])
        with ir.InsertionPoint(loop.body):
            out = body(Reg(loop.induction_variable), [Reg(v) for v in loop.inner_iter_args])
            scf.YieldOp([r.value for r in out])
        return [Reg(v) for v in loop.results]


def warpgroup_index() -> Reg:
    return Reg(utils.warpgroup_idx(sync=True))
