"""rope_write: the XLA form against numpy, the kernel's program executed in numpy, its machine code without a device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import KNOWN_DEVICES, explain
from pallas_kernels.paged_attention.simt_numpy import Numpy, _lanes
from pallas_kernels.rope_write import mosaic_sm90
from pallas_kernels.rope_write.api import rope_write
from pallas_kernels.rope_write.program import Problem, turn_and_write
from tests.pallas_kernels.aot import compile_for_h200

# heads, key/value heads, head dim, page size, tokens
SHAPES = {"llama": (32, 8, 128, 64), "gqa7": (14, 2, 64, 16), "mha": (4, 4, 32, 8), "odd": (3, 1, 24, 16)}
PAGES = 5


def case(shape: tuple[int, int, int, int], dtype: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Tokens at scattered slots; the third is padding (the trash page, not written), the last one past the pool."""
    heads, kv_heads, head_dim, page_size = shape
    rng = np.random.default_rng(seed)
    slots = np.array([2 * page_size + 1, 4 * page_size + page_size - 1, 0, page_size, PAGES * page_size], np.int32)
    angle = rng.uniform(-3, 3, (len(slots), head_dim // 2))
    pool = (PAGES, kv_heads, page_size, head_dim)
    return {
        "qkv": rng.normal(size=(len(slots), (heads + 2 * kv_heads) * head_dim)).astype(dtype),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "slots": slots,
        "k_pages": rng.normal(size=pool).astype(dtype),
        "v_pages": rng.normal(size=pool).astype(dtype),
    }


def expected(shape: tuple[int, int, int, int], data: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """In float64: a complex number per pair, multiplied by e^(i angle)."""
    heads, kv_heads, head_dim, page_size = shape
    rows = data["qkv"].astype(np.float64).reshape(len(data["slots"]), -1, head_dim)
    pairs = rows[..., : head_dim // 2] + 1j * rows[..., head_dim // 2 :]
    turned = pairs * (data["cos"] + 1j * data["sin"].astype(np.float64))[:, None, :]
    turned = np.concatenate([turned.real, turned.imag], -1)
    k_pages, v_pages = (data[name].astype(np.float64) for name in ("k_pages", "v_pages"))
    for token, slot in enumerate(data["slots"]):
        page, offset = divmod(int(slot), page_size)
        if 0 < page < PAGES:
            k_pages[page, :, offset] = turned[token, heads : heads + kv_heads]
            v_pages[page, :, offset] = rows[token, heads + kv_heads :]
    return turned[:, :heads], k_pages, v_pages


def close(got: Any, want: np.ndarray, dtype: Any) -> None:
    """One rounding to the dtype, and three in float32 (two products and their sum) before it."""
    error = float(ml_dtypes.finfo(dtype).eps) * 0.51 + 4 * 2.0**-23
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=error, atol=error)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_against_complex_numbers(shape: tuple[int, int, int, int], dtype: Any) -> None:
    data = case(shape, dtype)
    got = jax.jit(rope_write)(**data)
    for g, w in zip(got, expected(shape, data), strict=True):
        close(g, w, dtype)


class NumpyOps(Numpy):
    """simt_numpy with what `mosaic_sm90.Ops` adds."""

    kind = "bf16"

    def pointer_at(self, name: str, row: Any, row_bytes: int, offset: Any) -> Any:
        return name, row * row_bytes + offset

    def load_slot(self, token: Any) -> Any:
        return self.load_global("slots", token * 4)

    def load_words(self, pointer: Any, offset: int, count: int) -> list[Any]:
        return [self.load_global(pointer[0], self._inside(pointer, offset) + 4 * i) for i in range(count)]

    def load_floats(self, pointer: Any) -> list[Any]:
        return [self.load_global_f32(pointer[0], self._inside(pointer, 0) + 4 * i) for i in range(4)]

    def store_words(self, pointer: Any, offset: int, words: list[Any]) -> None:
        assert (pointer[1] + offset)[self.active].min() % 8 == 0
        self.store_global2(pointer[0], pointer[1] + offset, *(word.astype(np.int64) & 0xFFFFFFFF for word in words))

    def load_scale(self, name: str, index: Any) -> Any:
        return self.load_global_f32(name, np.where(self.active, index * 4, 0))

    def divide(self, x: Any, y: Any) -> Any:
        return _lanes(np.asarray(x, np.float32) / np.asarray(y, np.float32), np.float32)

    def store_byte_quad(self, pointer: Any, offset: int, values: list[Any]) -> None:
        stored = np.clip(np.stack(values, -1), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        for lane in np.flatnonzero(self.active):
            at = pointer[1][lane] + offset
            assert at % 4 == 0
            self.buffers[pointer[0]][at : at + 4] = stored[lane]

    def unpack(self, word: Any) -> Any:
        kind = ml_dtypes.bfloat16 if self.kind == "bf16" else np.float16
        pair = _lanes(word, np.int64).astype(np.uint32).reshape(32, 1).view(kind).astype(np.float32)
        return _lanes(pair[:, 0]), _lanes(pair[:, 1])

    def when(self, condition: Any, body: Any) -> None:
        """Conditions nest."""
        super().when(np.broadcast_to(condition, (32,)) & self.active, body)

    def _inside(self, pointer: Any, offset: int) -> Any:
        """Idle lanes would read past the end."""
        return np.where(self.active, pointer[1] + offset, 0)


@pytest.mark.parametrize("threads", [128, 256])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_the_kernels_program(shape: tuple[int, int, int, int], dtype: Any, threads: int) -> None:
    data = case(shape, dtype)
    want = expected(shape, data)
    p = mosaic_sm90.problem(data["qkv"], data["k_pages"], threads)  # type: ignore[arg-type]
    assert isinstance(p, Problem) and p.heads == shape[0]
    q = np.full((len(data["slots"]), shape[0], shape[2]), 99, dtype)
    ops = NumpyOps(data | {"q": q}, [], 0)
    ops.kind = p.kind
    for token in range(len(data["slots"])):
        for warp in range(threads // 32):
            turn_and_write(ops, p, _lanes(token, np.int64), _lanes(np.arange(32) + 32 * warp, np.int64))
    for got, w in zip((q, data["k_pages"], data["v_pages"]), want):
        close(got, w, dtype)


@pytest.mark.parametrize("scales", [1, 8])
def test_the_kernels_program_on_fp8_pages(scales: int) -> None:
    """Bit for bit what XLA stores: rounded to 16 bits, divided by the scale, clamped, rounded to fp8."""
    data = case(SHAPES["llama"], ml_dtypes.bfloat16)
    rng = np.random.default_rng(1)
    k_scale, v_scale = (rng.uniform(0.001, 0.02, scales).astype(np.float32) for _ in range(2))  # some are clamped
    for name in ("k_pages", "v_pages"):
        data[name] = data[name].astype(ml_dtypes.float8_e4m3fn)
    scaled = jax.jit(lambda k, v, given: rope_write(**given, k_scale=k, v_scale=v, implementation="xla"))
    want = scaled(k_scale, v_scale, data)
    p = mosaic_sm90.problem(data["qkv"], data["k_pages"], 256, scales)  # type: ignore[arg-type]
    q = np.zeros((len(data["slots"]), 32, 128), ml_dtypes.bfloat16)
    ops = NumpyOps(data | {"q": q, "k_scale": k_scale, "v_scale": v_scale}, [], 0)
    for token in range(len(data["slots"])):
        for warp in range(8):
            turn_and_write(ops, p, _lanes(token, np.int64), _lanes(np.arange(32) + 32 * warp, np.int64))
    for got, w in zip((data["k_pages"], data["v_pages"]), want[1:]):
        different = got[1:].view(np.uint8) != np.asarray(w)[1:].view(np.uint8)
        assert different.mean() < 1e-3  # a sum that falls on the other side of a rounding: never more than one step
        close(got[1:].astype(np.float32), np.asarray(w)[1:].astype(np.float64), ml_dtypes.float8_e4m3fn)


def test_machine_code_on_fp8_pages() -> None:
    data = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in case(SHAPES["llama"], ml_dtypes.bfloat16).items()}
    pool = jax.ShapeDtypeStruct(data["k_pages"].shape, jnp.float8_e4m3fn)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    given = [data["qkv"], data["cos"], data["sin"], data["slots"], pool, pool, scale, scale]
    compiled = compile_for_h200(
        lambda *a: mosaic_sm90.rope_write(*a[:6], k_scale=a[6], v_scale=a[7]), *given, donate_argnums=(4, 5)
    )
    assert compiled.spill_bytes == 0 and compiled.registers <= 64 and " copy(" not in compiled.hlo
    assert compiled.count("cvt.rn.satfinite.e4m3x2.f32") >= 4


def test_machine_code_writes_in_place() -> None:
    data = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case(SHAPES["llama"], ml_dtypes.bfloat16).items()
    }
    compiled = compile_for_h200(mosaic_sm90.rope_write, *data.values(), donate_argnums=(4, 5))
    assert compiled.spill_bytes == 0 and compiled.registers <= 64
    assert "output_to_operand_aliasing" in compiled.hlo and " copy(" not in compiled.hlo
    assert compiled.count("ld.global.v2.b32") >= 2 and compiled.count("st.global.v2.b32") >= 6


def test_who_takes_what() -> None:
    def chosen(dtype: Any, pages: Any = None) -> tuple[str | None, str]:
        data = case(SHAPES["llama"], dtype)
        pool = jax.ShapeDtypeStruct(data["k_pages"].shape, pages or dtype)
        args = [jax.ShapeDtypeStruct(data[n].shape, data[n].dtype) for n in ("qkv", "cos", "sin", "slots")]
        choice = explain("rope_write", *args, pool, pool, device=KNOWN_DEVICES["h200"])
        return choice.chosen, " ".join(reason for _, reason in choice.refused)

    assert chosen(jnp.bfloat16)[0] == chosen(jnp.float16)[0] == "mosaic_sm90"
    assert chosen(jnp.float32)[0] == "xla"
    assert chosen(jnp.bfloat16, jnp.float8_e4m3fn)[0] == "mosaic_sm90"
    name, reason = chosen(jnp.bfloat16, jnp.float8_e5m2)
    assert name == "xla" and "pages of the same dtype" in reason


def test_wrong_arguments_are_named() -> None:
    data = case(SHAPES["mha"], np.float32)
    for change, message in (
        ({"qkv": data["qkv"][:, :-1]}, "qkv must be"),
        ({"cos": data["cos"][:, :-1]}, "cos and sin"),
        ({"slots": data["slots"][:-1]}, "slots must be"),
        ({"v_pages": data["v_pages"][1:]}, "must both be"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_write(**(data | change))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernel")
@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_on_the_device(tokens: int) -> None:
    """Against the XLA form, at Llama-3.1-8B's shape, with padding and with distinct slots in random pages."""
    rng = np.random.default_rng(tokens)
    shape, pages = SHAPES["llama"], 40
    heads, kv_heads, head_dim, page_size = shape
    slots = rng.permutation(np.arange(page_size, pages * page_size))[:tokens].astype(np.int32)
    slots[tokens // 2 :: 7] = 0  # padding
    pool = (pages, kv_heads, page_size, head_dim)
    angle = jnp.asarray(rng.uniform(-3, 3, (tokens, head_dim // 2)), jnp.float32)
    qkv = jnp.asarray(rng.normal(size=(tokens, (heads + 2 * kv_heads) * head_dim)), jnp.bfloat16)
    k_pages, v_pages = (jnp.asarray(rng.normal(size=pool), jnp.bfloat16) for _ in range(2))
    given = (qkv, jnp.cos(angle), jnp.sin(angle), jnp.asarray(slots), k_pages, v_pages)
    got = jax.jit(lambda *a: rope_write(*a, implementation="mosaic_sm90"))(*given)
    want = jax.jit(lambda *a: rope_write(*a, implementation="xla"))(*given)
    for g, w, whole in zip(got, want, (True, False, False)):
        g, w = (np.asarray(x, np.float32) for x in (g, w))
        g, w = (g, w) if whole else (g[1:], w[1:])  # page 0 is the padding's
        np.testing.assert_allclose(g, w, rtol=2.0**-7, atol=2.0**-20)  # a product fused with its sum: one ulp of bf16
