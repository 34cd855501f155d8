"""The few PTX instructions that Pallas does not reach, as functions on MLIR values (for use in plgpu.inline_mgpu).

All integers are i32, all shared-memory addresses are i32 offsets of the shared window, global ones i64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf


def i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64_type() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def f32_type() -> ir.Type:
    return ir.F32Type.get()


def const(value: int) -> ir.Value:
    """i32 constant; values of 2^31 and more are taken as bit patterns."""
    return arith.constant(i32_type(), value - (1 << 32) if value >= 1 << 31 else value)


def const64(value: int) -> ir.Value:
    return arith.constant(i64_type(), value)


def f32(value: float) -> ir.Value:
    return arith.constant(f32_type(), value)


class Int:
    """An i32 with operators (unsigned division and shift). `Int.of` also takes Python integers."""

    def __init__(self, value: ir.Value):
        self.value = value

    @staticmethod
    def of(value: Int | ir.Value | int) -> Int:
        if isinstance(value, Int):
            return value
        return Int(const(value)) if isinstance(value, int) else Int(value)

    def _op(self, fn: Callable[..., ir.Value], other: Any) -> Int:
        return Int(fn(self.value, Int.of(other).value))

    def __add__(self, other):
        return self if isinstance(other, int) and other == 0 else self._op(arith.addi, other)

    def __sub__(self, other):
        return self._op(arith.subi, other)

    def __mul__(self, other):
        return self if isinstance(other, int) and other == 1 else self._op(arith.muli, other)

    def __floordiv__(self, other):
        return self if isinstance(other, int) and other == 1 else self._op(arith.divui, other)

    def __mod__(self, other):
        return self._op(arith.remui, other)

    def __and__(self, other):
        return self._op(arith.andi, other)

    def __or__(self, other):
        return self._op(arith.ori, other)

    def __xor__(self, other):
        return self._op(arith.xori, other)

    def __lshift__(self, other):
        return self if isinstance(other, int) and other == 0 else self._op(arith.shli, other)

    def __rshift__(self, other):
        return self if isinstance(other, int) and other == 0 else self._op(arith.shrui, other)

    def _cmp(self, predicate: arith.CmpIPredicate, other: Any) -> ir.Value:
        return arith.cmpi(predicate, self.value, Int.of(other).value)

    def lt(self, other) -> ir.Value:
        return self._cmp(arith.CmpIPredicate.ult, other)

    def eq(self, other) -> ir.Value:
        return self._cmp(arith.CmpIPredicate.eq, other)

    def min(self, other) -> Int:
        return self._op(arith.minui, other)

    def i64(self) -> ir.Value:
        return arith.extui(i64_type(), self.value)


def select(condition: ir.Value, a: Int | int, b: Int | int) -> Int:
    return Int(arith.select(condition, Int.of(a).value, Int.of(b).value))


def offset(base: ir.Value, *terms: ir.Value) -> ir.Value:
    """i64 address plus i64 terms."""
    for term in terms:
        base = arith.addi(base, term)
    return base


def global_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i64_type(), mgpu.memref_ptr(ref))


def shared_address(ref: ir.Value) -> Int:
    return Int(llvm.ptrtoint(i32_type(), mgpu.memref_ptr(ref)))


def asm(text: str, *args: Any, results: Sequence[ir.Type] = (), volatile: bool = False) -> tuple[ir.Value, ...]:
    """Inline PTX; `volatile` keeps its place among other volatile ones."""
    values = [a.value if isinstance(a, Int) else a for a in args]
    if not results:
        mgpu.inline_ptx(text, *values)
        return ()
    out = mgpu.inline_ptx(text, *values, result_types=list(results), has_side_effects=volatile)
    assert isinstance(out, tuple)
    return out


def special(name: str) -> Int:
    """A special register, e.g. "%tid.x"."""
    return Int(asm(f"mov.u32 $0, {name};", results=[i32_type()])[0])


def opaque(value: int) -> Int:
    """The same value, which LLVM does not know."""
    return Int(asm(f"mov.u32 $0, {value};", results=[i32_type()], volatile=True)[0])


def lop3_and_or(a: Int, mask: int, bits: int) -> Int:
    """(a & mask) | bits in one instruction."""
    return Int(asm("lop3.b32 $0, $1, $2, $3, 0xEA;", a, const(mask), const(bits), results=[i32_type()])[0])


def prmt(a: Int, b: Int, selector: int) -> Int:
    return Int(asm("prmt.b32 $0, $1, $2, $3;", a, b, const(selector), results=[i32_type()])[0])


def packed(op: str, dtype: str, a: Int, b: Int) -> Int:
    """Two 16-bit lanes at once: op "sub", "mul" or "add", dtype "bf16" or "f16"."""
    return Int(asm(f"{op}.rn.{dtype}x2 $0, $1, $2;", a, b, results=[i32_type()])[0])


def packed_fma(dtype: str, a: Int, b: Int, c: Int) -> Int:
    return Int(asm(f"fma.rn.{dtype}x2 $0, $1, $2, $3;", a, b, c, results=[i32_type()])[0])


def load_shared(address: Int, words: int) -> list[Int]:
    """1, 2 or 4 words of 32 bits in one access."""
    if words == 1:
        return [Int(asm("ld.shared.b32 $0, [$1];", address, results=[i32_type()], volatile=True)[0])]
    names = ", ".join(f"${i}" for i in range(words))
    text = f"ld.shared.v{words}.b32 {{{names}}}, [${words}];"
    return [Int(v) for v in asm(text, address, results=[i32_type()] * words, volatile=True)]


def load_shared_u16(address: Int) -> Int:
    text = "{ .reg .b16 h; ld.shared.b16 h, [$1]; cvt.u32.u16 $0, h; }"
    return Int(asm(text, address, results=[i32_type()], volatile=True)[0])


def load_shared_f32(address: Int, cluster: bool = False) -> ir.Value:
    space = "shared::cluster" if cluster else "shared"
    return asm(f"ld.{space}.f32 $0, [$1];", address, results=[f32_type()], volatile=True)[0]


def store_shared_f32(address: Int, value: ir.Value) -> None:
    asm("st.shared.f32 [$0], $1;", address, value)


def ldmatrix_x4(address: Int) -> list[Int]:
    """Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8."""
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    return [Int(v) for v in asm(text, address, results=[i32_type()] * 4, volatile=True)]


def mma_m16n8k16(dtype: str, acc: Sequence[ir.Value], a: Sequence[Int], b: Sequence[Int]) -> list[ir.Value]:
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return list(asm(text, *a, *b, *acc, results=[f32_type()] * 4))


def wgmma_rs(dtype: str, n: int, acc: Sequence[ir.Value], a: Sequence[Int], b_descriptor: ir.Value) -> list[ir.Value]:
    """acc [n/2 registers] += A (four registers, 64 x 16 over the warpgroup) times B [n, 16] in shared memory."""
    count = n // 2
    registers = ", ".join(f"${i}" for i in range(count))
    a_at = 2 * count
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} "
        f"{{{registers}}}, {{${a_at}, ${a_at + 1}, ${a_at + 2}, ${a_at + 3}}}, ${a_at + 4}, p, 1, 1, 0; }}"
    )
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * 4 + ["l"]
    return _tied(text, constraints, [*acc, *(v.value for v in a), b_descriptor], count)


def _tied(text: str, constraints: list[str], args: list[ir.Value], count: int) -> list[ir.Value]:
    """Inline PTX with `count` float32 results, whose registers are its first inputs too."""
    struct = llvm.StructType.get_literal([f32_type()] * count)
    out = llvm.inline_asm(struct, args, text, ",".join(constraints), has_side_effects=True)
    return [llvm.extractvalue(f32_type(), out, [i]) for i in range(count)]


def wgmma_fence() -> None:
    asm("wgmma.fence.sync.aligned;")


def wgmma_commit() -> None:
    asm("wgmma.commit_group.sync.aligned;")


def wgmma_wait(pending: int, acc: Sequence[ir.Value] = ()) -> list[ir.Value]:
    """Waits until at most `pending` groups run; returns `acc`, to be read only from here on."""
    text = f"wgmma.wait_group.sync.aligned {pending};"
    if not acc:
        asm(text)
        return []
    count = len(acc)
    return _tied(text, ["=f"] * count + [str(i) for i in range(count)], list(acc), count)


def keep_alive(values: Sequence[Int]) -> None:
    """Registers that the tensor core may still read keep their contents up to here."""
    if values:
        asm("// " + " ".join(f"${i}" for i in range(len(values))), *values)


def b_descriptor(address: Int) -> ir.Value:
    """wgmma descriptor of B [n, 64] 16-bit, K contiguous, rows of 128 bytes in the 128-byte swizzle."""
    base = arith.constant(i64_type(), 1 << 62 | 64 << 32 | 1 << 16)  # swizzle, 1024 bytes between 8-row groups
    return arith.ori(base, (address >> 4).i64())


def set_registers(count: int, increase: bool) -> None:
    asm(f"setmaxnreg.{'inc' if increase else 'dec'}.sync.aligned.u32 {count};")


def named_barrier(index: Int | int, threads: int) -> None:
    if isinstance(index, int):
        asm(f"bar.sync {index}, {threads};")
    else:
        asm("bar.sync $0, $1;", index, const(threads))


def fence_async_shared() -> None:
    """Writes to shared memory become visible to the copy engine."""
    asm("fence.proxy.async.shared::cta;")


def bulk_store_read() -> None:
    """Waits until the copy engine has read the sources of all copies that this thread committed."""
    asm("cp.async.bulk.wait_group.read 0;")


def stmatrix_x4_trans(address: Int, values: Sequence[Int]) -> None:
    """Four 8x8 matrices of 16-bit elements, transposed; lane l gives the address of row l % 8 of matrix l / 8."""
    asm("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};", address, *values)


def pack16(dtype: str, low: ir.Value, high: ir.Value) -> Int:
    """Two float32 rounded to one word of 16-bit floats."""
    return Int(asm(f"cvt.rn.{dtype}x2.f32 $0, $1, $2;", high, low, results=[i32_type()])[0])


def load_shared_f32x4(address: Int, cluster: bool) -> tuple[ir.Value, ...]:
    space = "shared::cluster" if cluster else "shared"
    text = f"ld.{space}.v4.f32 {{$0, $1, $2, $3}}, [$4];"
    return asm(text, address, results=[f32_type()] * 4, volatile=True)


def store_global(address: ir.Value, words: Sequence[Int]) -> None:
    """2 or 4 words of 32 bits in one access."""
    names = ", ".join(f"${i + 1}" for i in range(len(words)))
    asm(f"st.global.v{len(words)}.b32 [$0], {{{names}}};", address, *words)


def store_global_f32(address: ir.Value, value: ir.Value, offset: int) -> None:
    asm(f"st.global.f32 [$0+{offset}], $1;", address, value)


def mbarrier_arrive_remote(address: Int) -> None:
    """Arrives at a barrier given by `cluster_map`, releasing this thread's writes to the cluster."""
    asm("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [$0];", address)


def mbarrier_wait_cluster(address: Int, parity: Int) -> None:
    """`mbarrier_wait` that also acquires what the other blocks of the cluster wrote."""
    asm(
        "{ .reg .pred p; WAIT_${:uid}: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], $1; "
        "@p bra DONE_${:uid}; bra WAIT_${:uid}; DONE_${:uid}: }",
        address,
        parity,
    )


def fma_f32(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return asm("fma.rn.f32 $0, $1, $2, $3;", a, b, c, results=[f32_type()])[0]


def bits_to_f32(value: Int) -> ir.Value:
    return arith.bitcast(f32_type(), value.value)


def half_to_f32(value: Int, high: bool) -> ir.Value:
    """The low or the high float16 of a word."""
    pick = "mov.b32 {skip, h}, $1;" if high else "mov.b32 {h, skip}, $1;"
    return asm(f"{{ .reg .b16 h, skip; {pick} cvt.f32.f16 $0, h; }}", value, results=[f32_type()])[0]


def mbarrier_init(address: Int, count: int) -> None:
    asm("mbarrier.init.shared::cta.b64 [$0], $1;", address, const(count))


def mbarrier_expect(address: Int, size: int) -> None:
    asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", address, const(size))


def mbarrier_arrive(address: Int) -> None:
    asm("mbarrier.arrive.shared::cta.b64 _, [$0];", address)


def mbarrier_wait(address: Int, parity: Int) -> None:
    asm(
        "{ .reg .pred p; WAIT_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; "
        "@p bra DONE_${:uid}; bra WAIT_${:uid}; DONE_${:uid}: }",
        address,
        parity,
    )


def bulk_load(destination: Int, source: ir.Value, size: int, barrier: Int) -> None:
    """Contiguous copy global -> shared by the copy engine; all 16-byte aligned; read once, so evicted first."""
    asm(
        "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[$0], [$1], $2, [$3], policy; }",
        destination,
        source,
        const(size),
        barrier,
    )


def bulk_load_keep(destination: Int, source: ir.Value, size: int, barrier: Int) -> None:
    """The same for data that other blocks read too."""
    asm(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        destination,
        source,
        const(size),
        barrier,
    )


def bulk_prefetch(source: ir.Value, size: Int) -> None:
    """Global memory into L2, nobody waits; 16-byte aligned."""
    asm("cp.async.bulk.prefetch.L2.global [$0], $1;", source, size)


def cluster_map(address: Int, rank: Int | int) -> Int:
    """The address of the same shared-memory location in another block of the cluster."""
    return Int(asm("mapa.shared::cluster.u32 $0, $1, $2;", address, Int.of(rank), results=[i32_type()])[0])


def syncthreads() -> None:
    asm("bar.sync 0;")


def elect() -> ir.Value:
    """True in one lane of a converged warp; ptxas knows that it is one, and uses uniform registers inside."""
    return nvvm.elect_sync()


def syncwarp() -> None:
    asm("bar.warp.sync 0xffffffff;")


def cluster_sync() -> None:
    asm("barrier.cluster.arrive.release.aligned;")
    asm("barrier.cluster.wait.acquire.aligned;")


def cluster_leave() -> None:
    """`cluster_sync` that orders no memory: nobody exits before all have come here."""
    asm("barrier.cluster.arrive.relaxed.aligned;")
    asm("barrier.cluster.wait.aligned;")


def fence_mbarrier_init() -> None:
    asm("fence.mbarrier_init.release.cluster;")


@contextlib.contextmanager
def when(condition: ir.Value) -> Iterator[None]:
    op = scf.IfOp(condition)
    with ir.InsertionPoint(op.then_block):
        yield
        scf.yield_([])


def either(condition: ir.Value, then: Callable[[], None], other: Callable[[], None]) -> None:
    """then() where the condition holds, other() elsewhere: one branch, which two `when` need not become."""
    op = scf.IfOp(condition, has_else=True)
    for block, body in ((op.then_block, then), (op.else_block, other)):
        with ir.InsertionPoint(block):
            body()
            scf.yield_([])


def loop(
    count: Int | int, carry: Sequence[ir.Value], body: Callable[[Int, list[ir.Value]], Sequence[ir.Value]]
) -> list[ir.Value]:
    """for i in range(count): carry = body(i, carry)."""
    op = scf.ForOp(const(0), Int.of(count).value, const(1), list(carry))
    with ir.InsertionPoint(op.body):
        scf.yield_(list(body(Int(op.induction_variable), list(op.inner_iter_args))))
    return list(op.results)
