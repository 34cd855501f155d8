"""What both ops share: dequantization as plain arithmetic, the "sm90" layout, and the kernels compiled for an H200."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.a16 import decode_config, decode_sm90, dequant, wgmma_config, wgmma_sm90
from pallas_kernels.a16.cases import CASES, LLAMA_8B, Case, make, worst
from pallas_kernels.a16.stored import KINDS
from pallas_kernels.dispatch import KNOWN_DEVICES
from pallas_kernels.w4a16 import layout as four
from pallas_kernels.w8a16 import layout as eight
from tests.pallas_kernels.aot import compile_for_h200

H200 = KNOWN_DEVICES["h200"]
FLOAT = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


class Words:
    """numpy uint32 in the place of `ptx.Int`, so that `dequant` runs without a GPU."""

    def __init__(self, value):
        self.value = np.asarray(value, np.uint32)

    @staticmethod
    def of(value):
        return value if isinstance(value, Words) else Words(value)

    def __rshift__(self, n):
        return Words(self.value >> np.uint32(n))

    def __lshift__(self, n):
        return Words(self.value << np.uint32(n))

    def __and__(self, other):
        return Words(self.value & Words.of(other).value)

    def __or__(self, other):
        return Words(self.value | Words.of(other).value)


def _halves(word: Words, dtype: str) -> np.ndarray:
    return np.stack([word.value & 0xFFFF, word.value >> 16], -1).astype(np.uint16).view(FLOAT[dtype])


def _packed(op: str, dtype: str, a: Words, b: Words) -> Words:
    x, y = _halves(a, dtype).astype(np.float64), _halves(b, dtype).astype(np.float64)
    out = {"sub": x - y, "mul": x * y}[op].astype(FLOAT[dtype]).view(np.uint16).astype(np.uint32)
    return Words(out[..., 0] | out[..., 1] << 16)


def _prmt(a: Words, b: Words, selector: int) -> Words:
    pool = [(v.value >> np.uint32(8 * i)) & 0xFF for v in (a, b) for i in range(4)]
    picked = [pool[selector >> 4 * i & 7] for i in range(4)]
    return Words(sum((p << np.uint32(8 * i) for i, p in enumerate(picked)), np.zeros_like(picked[0])))


@pytest.fixture
def on_numpy(monkeypatch):
    monkeypatch.setattr(dequant, "Int", Words)
    monkeypatch.setattr(dequant, "lop3_and_or", lambda a, mask, bits: (a & mask) | bits)
    monkeypatch.setattr(dequant, "packed", _packed)
    monkeypatch.setattr(dequant, "prmt", _prmt)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["u4", "s8", "e4m3"])
@pytest.mark.parametrize("zero", [False, True])
def test_dequantization_is_exact(on_numpy, name: str, dtype: str, zero: bool) -> None:
    """All nibbles or bytes in every place of a register, by every zero point: integers come out exactly."""
    if name == "e4m3" and zero:
        pytest.skip("fp8 has no zero points")
    bits = 4 if name == "u4" else 8
    values = np.arange(1 << bits, dtype=np.uint32)
    zeros = np.arange(16 if name == "u4" else 256, dtype=np.uint32) if zero else np.zeros(1, np.uint32)
    stored, z = np.meshgrid(values, zeros, indexing="ij")
    signed = lambda v: v.astype(np.uint8).view(np.int8).astype(float)  # noqa: E731
    value = {
        "u4": stored.astype(float),
        "s8": signed(stored),
        "e4m3": stored.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float),
    }[name]
    subtracted = (z.astype(float) if name == "u4" else signed(z)) if zero else (8.0 if name == "u4" else 0.0)
    table = Words(z | (z ^ 1) << 8)  # row g has the zero z, row g + 8 another
    pairs = None
    if zero:
        pairs = tuple(dequant.zero_pair(KINDS[name], dtype, table, high) for high in (False, True))
        other = (z ^ 1).astype(float) if name == "u4" else signed(z ^ 1)
    width = 32 // bits  # elements in a word
    for place in range(width * KINDS[name].words):
        words = [np.zeros_like(stored) for _ in range(KINDS[name].words)]
        words[place // width] = stored << np.uint32(bits * (place % width))
        registers = dequant.DEQUANT[name](dtype, [Words(w) for w in words], pairs)
        # `fragments`: nibble i + 4 e of the word, or byte i % 2 + 2 e of word i // 2, is half e of register i.
        i, e = (place % 4, place // 4) if name == "u4" else (place // 4 * 2 + place % 2, place % 4 // 2)
        got = _halves(registers[i], dtype)[..., e].astype(float)
        want = value - (other if zero and i % 2 else subtracted)
        finite = np.isfinite(value)  # fp8's two NaN are weights that no loader lets in
        np.testing.assert_array_equal(got[finite], np.broadcast_to(want, got.shape)[finite])


def pack(case: Case):
    """(x, arrays and keyword arguments of the op in the layout an H200 prefers, numpy data)."""
    data = make(case)
    arrays = [None if a is None else jnp.asarray(a) for a in (data.qweight, data.scale, data.zero, data.offset)]
    group = case.group_size
    if case.qtype == "uint4":
        layout = four.preferred_layout(case.n, case.k, group, case.zero, H200)
        packed, back = four.to_layout(*arrays, layout, group), four.from_layout
    else:
        arrays = arrays[:3]
        layout = eight.preferred_layout(case.n, case.k, group, case.zero, H200)
        packed, back = eight.to_layout(*arrays, layout, group), eight.from_layout
    return data, arrays, packed, back(*packed, layout, group), layout


def call(case: Case, data, packed, layout: str, **more):
    q, s, z, *o = packed
    kwargs = dict(group_size=case.group_size, layout=layout, perm=None if data.perm is None else jnp.asarray(data.perm))
    if case.qtype == "uint4":
        return pallas_kernels.w4a16_matmul(jnp.asarray(data.x), q, s, z, offset=o[0], **kwargs, **more)
    return pallas_kernels.w8a16_matmul(jnp.asarray(data.x), q, s, z, **kwargs, **more)


# In float32, for the CPU sums bf16 products coarsely. Each of these is packed or padded in a way of its own.
LAYOUT_CASES = tuple(
    dataclasses.replace(c, x_dtype="float32")
    for c in (
        Case("uint4", 2, 128, 512, 32, "int", perm=True),
        Case("uint4", 2, 128, 512, 128, "offset", scale_dtype="float16"),
        Case("uint4", 2, 128, 512, -1, "offset"),
        Case("uint4", 2, 128, 512, scales="one"),
        Case("uint4", 2, 100, 200, 64, "int"),
        Case("int8", 2, 128, 512, scales="row", scale_dtype="float32"),
        Case("int8", 2, 100, 200, 64),
        Case("uint8", 2, 100, 160, 32, "int"),
        Case("uint8", 2, 128, 512, zero="int", scales="one"),
        Case("float8_e4m3fn", 2, 128, 512, 128),
    )
)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_layout_round_trip_and_xla_on_it(case: Case) -> None:
    """Every kind of weight: back bit for bit, and XLA on the packed arrays is right."""
    data, arrays, packed, back, layout = pack(case)
    assert layout == ("sm90" if case.n == 128 else f"sm90:{case.n}x{case.k}")
    for a, b in zip(arrays, back):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    assert worst(case, data, np.asarray(call(case, data, packed, layout).astype(jnp.float32))) <= 1


def test_layout_names_its_misfits() -> None:
    q, s = jnp.zeros((100, 100), jnp.uint8), jnp.ones((100, 4), jnp.bfloat16)
    with pytest.raises(ValueError, match="it is 'sm90:100x200', not 'sm90'"):
        four.to_layout(q, s, None, None, "sm90", 64)
    with pytest.raises(ValueError, match="unknown layout 'hopper'"):
        four.from_layout(q, s, None, None, "hopper", 64)
    assert four.preferred_layout(128, 256, 40, "none", H200) == "canonical"  # no kernel takes groups of 40
    assert four.preferred_layout(128, 256, 64, "none", KNOWN_DEVICES["l4"]) == "canonical"


@pytest.mark.parametrize(
    ("m", "device", "chosen", "reason"),
    [
        (1, "h200", "decode_sm90", ""),
        (16, "h100", "decode_sm90", ""),
        (64, "h200", "wgmma_sm90", "M = 64 is larger than"),
        (4096, "h200", "wgmma_sm90", "M = 4096 is larger than"),
        (0, "h200", "xla", "M = 0"),
        (16, "l4", "xla", "needs compute capability 9.0"),
        (16, "a100", "xla", "needs compute capability 9.0"),
        (16, "cpu", "xla", "needs compute capability 9.0"),
    ],
)
def test_explain(m: int, device: str, chosen: str, reason: str) -> None:
    case = Case("uint4", m, 256, 1024)
    data, _, packed, _, layout = pack(case)
    q, s, *_ = packed
    choice = pallas_kernels.explain(
        "w4a16_matmul", jnp.asarray(data.x), q, s, group_size=128, layout=layout, device=KNOWN_DEVICES[device]
    )
    assert choice.chosen == chosen
    assert all(reason in why for _, why in choice.refused)


def test_explain_says_what_keeps_a_call_on_xla() -> None:
    for case, reason in (
        (Case("uint4", 2, 256, 1024, x_dtype="float32"), "x is float32"),
        (Case("int8", 0, 256, 1024), "M = 0"),
    ):
        data, _, packed, _, layout = pack(case)
        op, q, s, *_ = ("w4a16_matmul" if case.qtype == "uint4" else "w8a16_matmul", *packed)
        kwargs = dict(group_size=case.group_size, device=H200)
        choice = pallas_kernels.explain(op, jnp.asarray(data.x), q, s, layout=layout, **kwargs)
        assert choice.chosen == "xla" and all(reason in why for _, why in choice.refused)
    data, arrays, *_ = pack(Case("int8", 4, 256, 1024))
    choice = pallas_kernels.explain("w8a16_matmul", jnp.asarray(data.x), *arrays[:2], **kwargs)
    assert choice.chosen == "xla" and all("canonical layout" in why for _, why in choice.refused)


def abstract(case: Case):
    """The op's arguments by shape only: (x, arrays, keyword arguments)."""
    S, group = jax.ShapeDtypeStruct, case.group_size
    groups = 1 if group == -1 else -(-case.k // group)
    table = (1, 1) if case.scales == "one" else (case.n, groups)
    q = S((case.n, case.k // 2), jnp.uint8) if case.qtype == "uint4" else S((case.n, case.k), case.qtype)
    arrays = [q, S(table, case.scale_dtype), S(table, jnp.uint8) if case.zero == "int" else None]
    if case.qtype == "uint4":
        arrays.append(S(table, case.scale_dtype) if case.zero == "offset" else None)
    module = four if case.qtype == "uint4" else eight
    layout = module.preferred_layout(case.n, case.k, group, case.zero, H200)
    packed = jax.eval_shape(lambda *a: module.to_layout(*a, layout, group), *arrays)
    return S((case.m, case.k), case.x_dtype), packed, dict(group_size=group, layout=layout)


@pytest.mark.parametrize("case", [c for c in CASES if c.m in (0, 2, 3, 64)], ids=str)
def test_every_case_has_a_kernel_or_says_why_not(case: Case) -> None:
    """On abstract shapes: a kernel takes everything but M = 0 and float32 x."""
    x, (q, s, z, *o), kwargs = abstract(case)
    op = "w4a16_matmul" if case.qtype == "uint4" else "w8a16_matmul"
    kwargs |= {"perm": jax.ShapeDtypeStruct((case.k,), jnp.int32)} if case.perm else {}
    kwargs |= {"offset": o[0]} if o and o[0] is not None else {}
    choice = pallas_kernels.explain(op, *((x, q, s) if z is None else (x, q, s, z)), **kwargs, device=H200)
    expected = "xla" if case.m == 0 or case.x_dtype == "float32" else "decode_sm90" if case.m <= 16 else "wgmma_sm90"
    assert choice.chosen == expected, choice


def _plan(module, kind: str, m: int, shape: tuple[int, int], group: int | None):
    n, k = shape
    return module.Plan(
        m, n, k, KINDS[kind], "bf16", "bf16", group or k, group is None, False, False, False, 132, module.Config()
    )


def overwritten_operands(sass: str) -> list[str]:
    """Instructions that write a register which a wgmma issued before may still read (empty without nvdisasm).

    Nothing in PTX or ptxas keeps a loop from writing operand A of the iteration before: an earlier version did, and
    was wrong once in a hundred runs.
    """
    code, labels, pending = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            pending.append(label[1])
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(\S+)\s*(.*)", line):
            labels.update(dict.fromkeys(pending, len(code)))
            pending.clear()
            code.append((found[1], found[2]))
    bad = []
    for end, (op, rest) in enumerate(code):
        target = re.search(r"\.L_x_\d+", rest) if op.startswith("BRA") else None
        start = labels.get(target[0], end) if target else end
        body = code[start : end + 1]
        if not any(op.startswith("HGMMA") for op, _ in body):
            continue
        read: set[int] = set()
        for op, rest in body * 2:
            registers = [int(r) for r in re.findall(r"\bR(\d+)\b", rest)]
            if op.startswith("WARPGROUP.DEPBAR"):
                read.clear()
            elif op.startswith("HGMMA"):
                read.update(range(registers[1], registers[1] + 4))
            elif re.match(r"LDS|LOP3|PRMT|SHF|HADD2|HFMA2|HMUL2|IMAD|MOV|IADD|LEA|SEL", op) and registers:
                width = 4 if ".128" in op else 2 if ".64" in op else 1
                if read & set(range(registers[0], registers[0] + width)):
                    bad.append(f"{op} {rest}")
    return bad


@pytest.mark.parametrize(
    ("kind", "group", "m", "layer", "config"),
    [
        ("s8", 128, 64, "gate_up", (4, 64, 128)),
        ("s8", 128, 64, "down", (2, 64, 256, 2, 0, 1, 2)),
        ("s8", 128, 64, "qkv", (2, 64, 256, 1, 0, 1, 2)),
        ("u4", 128, 16, "qkv", (2, 16, 256, 1, 0, 1, 2)),
        ("u4", 128, 16, "o", (2, 16, 256, 2, 0, 1, 2)),
        ("s8", 128, 256, "gate_up", (2, 256, 64)),
        ("s8", 128, 256, "down", (2, 256, 64, 1, 0, 4)),
        ("s8", 128, 4096, "gate_up", (2, 256, 64)),
        ("s8", 128, 4096, "down", (2, 256, 64)),
        ("s8", None, 4096, "down", (2, 256, 64)),  # this and the next were not timed, only compiled
        ("e4m3", 128, 4096, "gate_up", (2, 256, 64)),
        ("u4", 128, 64, "gate_up", (4, 64, 256)),
        ("u4", 128, 64, "down", (2, 64, 256, 2, 0, 1, 2)),
        ("u4", 128, 256, "gate_up", (2, 256, 64)),
        ("u4", 128, 256, "down", (2, 128, 128, 2)),
        ("u4", 128, 4096, "gate_up", (4, 128, 64)),
    ],
)
def test_wgmma_heuristic_picks_what_won(kind: str, group: int | None, m: int, layer: str, config: tuple) -> None:
    """The fastest configurations of bench/results/a16_variants.json (H200)."""
    plan = _plan(wgmma_sm90, kind, m, LLAMA_8B[layer], group)
    assert wgmma_config.heuristic(plan) == wgmma_sm90.Config(*config)


# What the heuristics pick for the acceptance shapes: (module, its heuristic, kind, group, M, layer, most registers); or
# a configuration in the heuristic's place.
# A wgmma kernel uses what the block's size allows: 168 with two consumer warpgroups, 96 with four.
COMPILED = {
    "decode u4 1": (decode_sm90, decode_config, "u4", 128, 1, "o", 96),
    "decode s8 16": (decode_sm90, decode_config, "s8", None, 16, "down", 128),
    "decode fp8 16": (decode_sm90, decode_config, "e4m3", 128, 16, "qkv", 128),
    "wgmma u4 64": (wgmma_sm90, wgmma_config, "u4", 128, 64, "o", 240),
    "wgmma s8 256": (wgmma_sm90, wgmma_config, "s8", None, 256, "down", 240),
    "wgmma s8 4096": (wgmma_sm90, wgmma_config, "s8", 128, 4096, "gate_up", 240),
    "wgmma fp8 4096": (wgmma_sm90, wgmma_config, "e4m3", 32, 4096, "qkv", 240),
    "wgmma u4 256": (wgmma_sm90, wgmma_config, "u4", 128, 256, "gate_up", 240),
    "groups u4 16": (wgmma_sm90, wgmma_sm90.Config(4, 16, 256, 2, k_groups=4), "u4", 128, 16, "down", 240),
    "groups s8 64": (wgmma_sm90, wgmma_sm90.Config(4, 64, 256, 1, k_groups=4), "s8", None, 64, "qkv", 240),
    "wgmma u4 4096": (wgmma_sm90, wgmma_config, "u4", 128, 4096, "gate_up", 240),
}


@pytest.mark.parametrize("kind", ["u4", "s8"])
def test_few_copies_by_one_lane(kind: str) -> None:
    """One elected lane makes few copies of a stage, and ptxas knows that it is one: no loops over lanes."""
    m, config, copies = 64, wgmma_sm90.Config(4, 64, 128), 3  # x, weights, scales
    plan = dataclasses.replace(_plan(wgmma_sm90, kind, m, LLAMA_8B["gate_up"], 128), config=config)
    compiled = compile_for_h200(
        lambda *a: wgmma_sm90.matmul(plan, *a),
        jax.ShapeDtypeStruct((m, plan.k), jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.n // 16, plan.k * 8 * plan.kind.words), jnp.uint8 if kind == "u4" else jnp.int8),
        jax.ShapeDtypeStruct((plan.n // 16, plan.groups, 8, 2), jnp.bfloat16),
    )
    loads = re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared::cluster\.global\S*", compiled.ptx)
    assert loads and len(loads) % copies == 0 and len(loads) <= 2 * copies  # LLVM may unroll the loop once
    assert "elect.sync" in compiled.ptx and compiled.spill_bytes == 0
    assert not overwritten_operands(compiled.sass) and "BRA.U.ANY" not in compiled.sass
    assert "serialized" not in compiled.report


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (wgmma_sm90.Config(4, 16, 256, k_groups=3), "3 groups along K of 4"),
        (wgmma_sm90.Config(4, 16, 128, k_groups=4), "4 groups along K"),  # 32 columns each
        (wgmma_sm90.Config(2, 16, 128, parts=2, k_groups=2), "2 groups along K"),
        (wgmma_sm90.Config(4, 16, 256, k_groups=2), "2 groups along K of 4 warpgroups, 224 tiles"),
    ],
)
def test_groups_along_k_refuse(config, reason: str) -> None:
    plan = dataclasses.replace(_plan(wgmma_sm90, "u4", 16, LLAMA_8B["gate_up"], 128), config=config)
    with pytest.raises(NotImplementedError, match=reason):
        plan.check()


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(name: str) -> None:
    module, heuristic, kind, group, m, layer, registers = COMPILED[name]
    plan = _plan(module, kind, m, LLAMA_8B[layer], group)
    config = heuristic if isinstance(heuristic, wgmma_sm90.Config) else heuristic.heuristic(plan)
    plan = dataclasses.replace(plan, config=config)
    dtype = {"u4": jnp.uint8, "s8": jnp.int8, "e4m3": jnp.float8_e4m3fn}[kind]
    scale = (plan.n, 1) if group is None else (plan.n // 16, plan.groups, 8, 2)
    compiled = compile_for_h200(
        lambda *a: module.matmul(plan, *a),
        jax.ShapeDtypeStruct((m, plan.k), jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.n // 16, plan.k * 8 * plan.kind.words), dtype),
        jax.ShapeDtypeStruct(scale, jnp.bfloat16),
    )
    assert compiled.spill_bytes == 0
    assert compiled.registers <= registers
    if module is wgmma_sm90:
        # A step's products (LLVM may unroll the loop over steps).
        products = compiled.count("wgmma.mma_async")
        assert products and products % (plan.group_step // 16) == 0
        assert not overwritten_operands(compiled.sass)
        assert "serialized" not in compiled.report  # C7512: too few registers for two products in flight
        pool = compiled.registers * (plan.config.warpgroups + 1)
        assert plan.consumer_registers * plan.config.warpgroups + plan.producer_registers <= pool  # else it hangs
    else:
        assert compiled.count("mma.sync") > 0
    if module is decode_sm90:
        # One lane's arrival speaks for the sums of all: bench/race_reports.py relies on the warp's barrier before it.
        arrivals, guarded = r"mbarrier\.arrive\.(?!expect_tx)", 0
        for sync in re.finditer(
            r"bar\.warp\.sync 0xffffffff;\s+// end inline asm\s+@\S+ bra\s+(\$L\w+);", compiled.ptx
        ):
            for start in (sync.end(), compiled.ptx.index(f"\n{sync[1]}:") + len(sync[1]) + 2):
                guarded += bool(re.search(arrivals, re.split(r"\$L\w+:|\bbra\b", compiled.ptx[start:], maxsplit=1)[0]))
        assert guarded == len(re.findall(arrivals, compiled.ptx)) > 0
