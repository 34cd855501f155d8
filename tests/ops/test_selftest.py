"""The self-test passes right weights in every scheme, and names the module when a kernel or its arrays are wrong."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.errors import EngineFailedError
from jqserve.ops import selftest
from jqserve.quant import QuantizedTensor, QuantSpec
from pallas_kernels import KNOWN_DEVICES, use_device
from tests.models.tiny import random_weight
from tests.ops.test_linear import ACTIVATIONS, WEIGHT_ONLY

SCHEMES = {name: scheme for name, scheme in (WEIGHT_ONLY | ACTIVATIONS).items() if scheme.qtype is not None}


def weight(name: str) -> Any:
    return random_weight(np.random.default_rng(0), 96, 256, SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
def test_right_weights_pass(name: str) -> None:
    lines = list(selftest.self_test([("layers.0.x", weight(name))], "float32", (4,)))
    assert len(lines) == 1 and lines[0].startswith("layers.0.x: within ")


@pytest.mark.parametrize("name", ["uint4", "fp8_token", "int8_token", "nf4"])
def test_a_wrong_product_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads one row's scale from its neighbour."""
    real = selftest.linear

    def wrong(x: Any, w: QuantizedTensor) -> Any:
        return real(x, w.replace(scale=jnp.roll(w.scale, 1, axis=0)))

    monkeypatch.setattr(selftest, "linear", wrong)
    with pytest.raises(EngineFailedError, match=r"self-test: layers\.3\.mlp\.down: .* with 4 rows differs .* by 0\.\d"):
        list(selftest.self_test([("layers.3.mlp.down", weight(name))], "float32", (4,)))


def test_nan_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "linear", lambda x, w: jnp.full((x.shape[0], w.shape[0]), jnp.nan))
    with pytest.raises(EngineFailedError, match="nan"):
        list(selftest.self_test([("a", weight("uint4"))], "float32", (4,)))


def test_a_module_of_zeros_passes() -> None:
    """Pruned layers exist; a share of nothing is no number, and refused to serve them."""
    zeros = weight("uint4")
    zeros = zeros.replace(scale=jnp.zeros_like(zeros.scale))
    assert list(selftest.self_test([("a", zeros)], "float32", (4,))) == ["a: within 0.0e+00 of the largest output"]


def test_one_weight_of_each_spec_is_tested() -> None:
    several = [(f"layers.{i}", weight("uint4")) for i in range(3)] + [("head", weight("nf4"))]
    assert [line.partition(":")[0] for line in selftest.self_test(several, "float32", (4,))] == ["layers.0", "head"]


def test_what_the_spec_does_not_say_makes_another_kernel_too() -> None:
    """An act-order weight takes x[:, perm], and scales of another dtype another program."""
    plain = weight("uint4")
    permuted = plain.replace(perm=jnp.asarray(np.random.default_rng(1).permutation(256), jnp.int32))
    half = plain.replace(scale=plain.scale.astype(jnp.float16))
    assert permuted.spec == plain.spec == half.spec and plain.perm is None and plain.scale.dtype != jnp.float16
    several = [("a", plain), ("b", permuted), ("c", permuted), ("d", half), ("e", plain)]
    assert [line.partition(":")[0] for line in selftest.self_test(several, "float32", (4,))] == ["a", "b", "d"]


def test_where_only_references_run_there_is_nothing_to_test() -> None:
    found = [("a", weight("uint4"))]
    assert not selftest.worth_testing(found)
    for device in ("h200", "a100"):  # there without any kernel, and all the more so: what runs has never run there
        with use_device(KNOWN_DEVICES[device]):
            assert selftest.worth_testing(found) and selftest.worth_testing([("a", weight("nf4"))])
            assert not selftest.worth_testing([])  # an unquantized model


def test_a_kernel_that_only_a_few_rows_take_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request at a time is what most people try first; 16 rows and a prefill chunk never came by that kernel."""
    real = selftest.linear
    monkeypatch.setattr(selftest, "kernel", lambda spec, m, *rest: "few" if m <= 8 else "w4a16/wgmma_sm90")
    monkeypatch.setattr(selftest, "linear", lambda x, w: real(x, w) * (0.5 if x.shape[0] <= 8 else 1.0))
    with pytest.raises(EngineFailedError, match=r"layers\.0: few with 8 rows differs .* by 0\.5"):
        list(selftest.self_test([("layers.0", weight("uint4"))], "float32", (1, 8, 16, 32, 64)))


def test_which_rows_are_told_apart() -> None:
    """AWQ's qkv of an 8B model: another kernel from 16 rows on, by the choice of pallas_kernels itself."""
    rows, shape = (1, 8, 16, 32, 64, 128, 256, 2048), (6144, 4096)
    spec = QuantSpec("uint4", shape, (1, 128), "int")
    grid = [jax.ShapeDtypeStruct(spec.grid, dtype) for dtype in (jnp.float16, jnp.uint8)]
    awq: Any = QuantizedTensor(jax.ShapeDtypeStruct((shape[0], shape[1] // 2), jnp.uint8), *grid, None, None, spec)
    with use_device(KNOWN_DEVICES["h200"]):
        assert selftest.telling_rows(awq, "bfloat16", rows) == (8, 16, 2048)
    assert selftest.telling_rows(awq, "bfloat16", rows) == (16, 2048)  # one kernel for all: XLA's reference
