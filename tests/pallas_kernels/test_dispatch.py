"""dispatch: order, device checks, explain; and that importing the package touches no device."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import KNOWN_DEVICES, current_device, dispatch, explain, use_device


@pytest.fixture
def op():
    def picky(x):
        if x.shape[0] % 2:
            raise NotImplementedError("takes even sizes")
        return x + 1

    implementations = [
        dispatch.Implementation("hopper", lambda x: x + 2, dispatch.hopper_only),
        dispatch.Implementation("even", picky),
        dispatch.Implementation("xla", lambda x: x),
    ]
    dispatch.register("test_op", implementations)
    yield "test_op"
    del dispatch._registry["test_op"]


@pytest.mark.parametrize("size, device, chosen", [(2, "h200", 2), (2, "cpu", 1), (3, "cpu", 0), (3, "l4", 0)])
def test_first_that_takes_the_call_runs(op, size, device, chosen):
    with use_device(KNOWN_DEVICES[device]):
        assert dispatch.call(op, None, jnp.zeros(size))[0] == chosen


def test_only_disables_the_fallback(op):
    with pytest.raises(NotImplementedError, match="even: takes even sizes"):
        dispatch.call(op, "even", jnp.zeros(3))
    with pytest.raises(ValueError, match="it has hopper, even, xla"):
        dispatch.call(op, "nope", jnp.zeros(3))


def test_explain_keeps_reasons(op):
    fn, x = functools.partial(dispatch.call, op), jax.ShapeDtypeStruct((3,), jnp.float32)
    choice = dispatch.explain(op, fn, None, x, device=KNOWN_DEVICES["a100"])
    assert choice.chosen == "xla"
    assert [name for name, _ in choice.refused] == ["hopper", "even"]
    assert "9.0" in choice.refused[0][1] and "even sizes" in choice.refused[1][1]
    alone = dispatch.explain(op, fn, "even", x, device=KNOWN_DEVICES["a100"])
    assert alone == dispatch.Choice(op, None, choice.refused[1:])


S = jax.ShapeDtypeStruct
X, PAGES = S((16, 512), jnp.bfloat16), S((9, 2, 16, 64), jnp.bfloat16)
ANGLES, SLOTS = S((4, 32), jnp.float32), S((4,), jnp.int32)
QKV, ONE, SM = S((4, 512), jnp.bfloat16), S((1, 1), jnp.float32), {"sm_scale": 0.1}
XQ, WQ = S((4, 512), jnp.int8), S((64, 512), jnp.int8)
NOTHING = {name: S((0,), name) for name in ("float32", "int32")}


@pytest.mark.parametrize("device", ["cpu", "a100", "h200"])
@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        ("scaled_matmul", (S((4, 0), jnp.int8), S((64, 0), jnp.int8), ONE, ONE), {}),
        ("scaled_matmul", (XQ, S((0, 512), jnp.int8), ONE, ONE), {}),
        ("rms_norm", (S((4, 0), jnp.bfloat16), S((0,), jnp.bfloat16)), {"eps": 1e-5}),
        ("quantize_rows", (S((4, 0), jnp.bfloat16), jnp.int8), {"divisor": 127.0}),
        ("decode_attention", (S((4, 0, 64), jnp.bfloat16), PAGES, PAGES, S((4, 3), jnp.int32), SLOTS), SM),
        ("prefill_attention", (S((4, 128, 0, 64), jnp.bfloat16), PAGES, PAGES, S((4, 3), jnp.int32), SLOTS, SLOTS), SM),
        (
            "sample",
            (
                S((0, 9), jnp.float32),
                *(NOTHING[d] for d in ("float32", "int32", "float32", "float32")),
                S((0, 2), jnp.uint32),
                NOTHING["int32"],
            ),
            {},
        ),
    ],
)
def test_nothing_to_compute_is_left_to_xla(op, args, kwargs, device):
    assert explain(op, *args, device=KNOWN_DEVICES[device], **kwargs).chosen == "xla"


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "chosen"),
    [
        ("quantize_rows", (X, jnp.int8), {"divisor": 127.0}, "mosaic_sm90"),  # a dtype by position
        ("quantize_rows", (X, "int8"), {"divisor": 127.0, "static_scale": 0.1}, "mosaic_sm90"),
        ("quantize_rows", (X, jnp.int8), {"divisor": 127.0, "implementation": "xla"}, "xla"),
        ("grouped_matmul", (X, S((4, 64, 512), jnp.bfloat16), S((4,), jnp.int32)), {}, "xla"),  # defaults left out
        ("rope_write", (S((4, 512), jnp.bfloat16), ANGLES, ANGLES, SLOTS, PAGES, PAGES), {}, "mosaic_sm90"),
    ],
)
def test_explain_takes_what_the_function_takes(op, args, kwargs, chosen):
    assert explain(op, *args, device=KNOWN_DEVICES["h200"], **kwargs).chosen == chosen


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "message"),
    [
        ("scaled_matmul", (S((4, 512), jnp.int8), S((64, 256), jnp.int8), ANGLES, ANGLES), {}, r"want xq \[M, K\]"),
        ("quantize_rows", (X, jnp.int4), {"divisor": 7.0}, "qdtype must be"),
        ("quantize_rows", (X, jnp.int8), {"divisor": 7.0, "static_scale": S((2, 1), jnp.float32)}, "static_scale must"),
        ("scaled_matmul", (XQ, WQ, S((4, 1), jnp.float32), ONE, S((64,), jnp.int32)), {}, "bias must be"),
        ("w8a16_matmul", (X, WQ, ONE), {"group_size": -1, "layout": "sm90"}, "sm90 layout"),
        ("decode_attention", (S((4, 8, 64), jnp.int32), PAGES, PAGES, S((4, 3), jnp.int32), SLOTS), SM, "q must be"),
        ("write_kv", (PAGES, PAGES, S((4, 2, 64), jnp.int8), S((4, 2, 64), jnp.int8), SLOTS), {}, "k must be floating"),
        ("rope_write", (S((4, 512), jnp.int8), ANGLES, ANGLES, SLOTS, PAGES, PAGES), {}, "qkv must be"),
        ("rope_write", (QKV, ANGLES, ANGLES, SLOTS, PAGES, PAGES), {"k_scale": S((3,), jnp.float32)}, "k_scale must"),
        ("sample", (S((1, 0), jnp.float32), *[ONE] * 6), {}, "V > 0"),
        ("paged_attention", (), {}, "known: decode_attention, .* rope_write, .* write_kv"),
    ],
)
def test_explain_refuses_what_the_function_refuses(op, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        explain(op, *args, device=KNOWN_DEVICES["h200"], **kwargs)


def test_use_device_nests():
    outer = current_device()
    with use_device(KNOWN_DEVICES["h200"]):
        with use_device(KNOWN_DEVICES["l4"]):
            assert current_device().kind == "NVIDIA L4"
        assert current_device().compute_capability == (9, 0)
    assert current_device() == outer


@pytest.mark.parametrize("device", ["cpu", "l4", "a100", "h200"])
def test_scaled_matmul_has_an_implementation_everywhere(device):
    s = jax.ShapeDtypeStruct
    xq, wq = s((16, 4096), jnp.float8_e4m3fn), s((4096, 4096), jnp.float8_e4m3fn)
    xs, ws = s((16, 1), jnp.float32), s((4096, 1), jnp.float32)
    assert explain("scaled_matmul", xq, wq, xs, ws, device=KNOWN_DEVICES[device]).chosen is not None


def test_import_touches_no_device():
    code = (
        "import pallas_kernels as p; from pallas_kernels import explain, quantize_rows, scaled_matmul;"
        "from jax._src import xla_bridge as b; assert not b._backends, b._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
