"""The instructions of the sampling kernel beside those of `paged_attention.simt`, emitted as MLIR."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, scf

from pallas_kernels.paged_attention.simt import Mlir, Reg


class Instructions(Mlir):
    """Conditions are i1. A branch or loop that holds a barrier wants a condition that all threads agree on."""

    # bits and order
    def as_float(self, x: Reg) -> Reg:
        return Reg(arith.bitcast(self.f32, x.value))

    def sort_key(self, x: Reg) -> Reg:
        """float32 -> i32 in the same (signed) order, both zeros equal; NaNs last."""
        bits = Reg(arith.bitcast(self.i32, (x + 0.0).value))
        return self._flip(bits)

    def from_key(self, key: Reg) -> Reg:
        return self.as_float(self._flip(key))

    def _flip(self, bits: Reg) -> Reg:
        sign = Reg(arith.shrsi(bits.value, self.const_i32(31).value))
        return bits ^ (sign & 0x7FFFFFFF)

    def rotate_left(self, x: Reg, distance: int) -> Reg:
        return self._ptx(f"shf.l.wrap.b32 $0, $1, $1, {distance};", x, out=self.i32)

    def below(self, x: Reg, y: Reg | int) -> Reg:
        """Unsigned x < y."""
        return x._compare(y, arith.CmpIPredicate.ult, None)

    def to_float(self, x: Reg) -> Reg:
        return Reg(arith.sitofp(self.f32, x.value))

    def bit_length(self, x: Reg) -> Reg:
        return self.const_i32(32) - self._ptx("clz.b32 $0, $1;", x, out=self.i32)

    # arithmetic
    def max_nan(self, x: Reg, y: Reg) -> Reg:
        """NaN where either is."""
        return self._ptx("max.NaN.f32 $0, $1, $2;", x, y, out=self.f32)

    def divide(self, x: Reg, y: Reg) -> Reg:
        return self._ptx("div.rn.f32 $0, $1, $2;", x, y, out=self.f32)

    def log(self, x: Reg) -> Reg:
        """libdevice's, as XLA's."""
        return Reg(math.log(x.value))

    def unknown(self, x: int) -> Reg:
        """A constant that the compiler does not know: it would unroll loops of so many rounds, for many registers."""
        return self._ptx(f"mov.b32 $0, {x};", out=self.i32, effects=True)

    # warp
    def _over_warp(self, what: str, x: Reg) -> Reg:
        return self._ptx(f"redux.sync.{what} $0, $1, 0xffffffff;", x, out=self.i32, effects=True, convergent=True)

    def warp_max(self, x: Reg) -> Reg:
        return self._over_warp("max.s32", x)

    def warp_min(self, x: Reg) -> Reg:
        return self._over_warp("min.s32", x)

    def warp_add(self, x: Reg) -> Reg:
        return self._over_warp("add.s32", x)

    def shuffle_up(self, x: Reg, distance: int) -> Reg:
        """Of the lane so far below; the first ones keep their own."""
        text = f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;"
        return self._ptx(text, x, out=self.i32, effects=True, convergent=True)

    def ballot(self, condition: Reg) -> Reg:
        text = "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
        wide = Reg(arith.extui(self.i32, condition.value))
        return self._ptx(text, wide, out=self.i32, effects=True, convergent=True)

    def same(self, condition: Reg) -> Reg:
        """A condition that all lanes agree on, told to the compiler."""
        return self.uniform(Reg(arith.extui(self.i32, condition.value))).equals(1)

    # memory
    def load_word(self, name: str, index: Reg) -> Reg:
        return self._ptx("ld.global.nc.b32 $0, [$1];", self.pointer(name, index, 4), out=self.i32)

    def load_float(self, name: str, index: Reg) -> Reg:
        return self.as_float(self.load_word(name, index))

    def load_floats(self, pointer: Reg, offset: int, count: int) -> list[Reg]:
        """1 or 4 of a buffer that this kernel does not write."""
        if count == 1:
            return [self._ptx(f"ld.global.nc.f32 $0, [$1 + {offset}];", pointer, out=self.f32)]
        text = f"ld.global.nc.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
        return self._ptx(text, pointer, out=[self.f32] * 4)

    def store_word(self, name: str, index: Reg, x: Reg) -> None:
        kind = "f32" if x.is_float else "b32"
        self._ptx(f"st.global.{kind} [$0], $1;", self.pointer(name, index, 4), x, effects=True)

    def load_shared_word(self, address: Reg) -> Reg:
        return self._ptx("ld.shared.b32 $0, [$1];", address, out=self.i32, effects=True)

    def store_shared_word(self, address: Reg, x: Reg) -> None:
        self._ptx("st.shared.b32 [$0], $1;", address, x, effects=True)

    def load_shared_floats(self, address: Reg, count: int) -> list[Reg]:
        return [self.load_shared(address)] if count == 1 else self.load_shared4(address)

    def store_shared_floats(self, address: Reg, x: Sequence[Reg]) -> None:
        if len(x) == 1:
            self._ptx("st.shared.f32 [$0], $1;", address, x[0], effects=True)
        else:
            self.store_shared4(address, x)

    def store_peer(self, address: Reg, words: Sequence[Reg]) -> None:
        """1 or 4 words at a `peer_address`."""
        words = [Reg(arith.bitcast(self.i32, w.value)) if w.is_float else w for w in words]
        if len(words) == 1:
            self._ptx("st.shared::cluster.b32 [$0], $1;", address, words[0], effects=True)
        else:
            self._ptx("st.shared::cluster.v4.b32 [$0], {$1, $2, $3, $4};", address, *words, effects=True)

    # control
    def cluster_barrier(self) -> None:
        """The aligned barrier wants whole warps, and the lanes that told something come later than the others."""
        self.sync_warp()
        super().cluster_barrier()

    def update(self, condition: Reg, carry: list[Reg], then: Callable[[], list[Reg]]) -> list[Reg]:
        """then() where the condition holds, `carry` elsewhere."""
        op = scf.IfOp(condition.value, [c.value.type for c in carry], has_else=True)
        for block, values in ((op.then_block, then), (op.else_block, lambda: carry)):
            with ir.InsertionPoint(block):
                scf.yield_([r.value for r in values()])
        return [Reg(v) for v in op.results]

    def repeat(self, carry: list[Reg], body: Callable[[list[Reg]], list[Reg]]) -> list[Reg]:
        """do carry = body(carry) while its first, an i32, is not 0."""
        types = [c.value.type for c in carry]
        op = scf.WhileOp(types, [c.value for c in carry])
        with ir.InsertionPoint(op.before.blocks.append(*types)):
            out = body([Reg(v) for v in op.before.blocks[0].arguments])
            scf.ConditionOp((out[0].equals(0) ^ True).value, [r.value for r in out])
        with ir.InsertionPoint(op.after.blocks.append(*types)):
            scf.YieldOp(list(op.after.blocks[0].arguments))
        return [Reg(v) for v in op.results]
