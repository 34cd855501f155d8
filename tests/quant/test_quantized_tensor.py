"""QuantSpec and QuantizedTensor: JSON, packing, the arithmetic of `dequantize`, life as a pytree."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jqserve.quant import ActivationSpec, QuantizedTensor, QuantSpec, dequantize
from jqserve.quant.packing import pack_uint4, unpack_uint4

SPEC = QuantSpec("uint4", (6, 10), (1, 4), "int", ActivationSpec("dynamic_token", "int8", 127.5))


def test_json_round_trip() -> None:
    for spec in (SPEC, SPEC.replace(zero="none", layout="x"), QuantSpec("float8_e4m3fn", (2, 2), (2, 2))):
        back = QuantSpec.from_json(json.loads(json.dumps(spec.to_json())))
        assert back == spec and hash(back) == hash(spec)


def test_grid_counts_ragged_groups() -> None:
    assert SPEC.grid == (6, 3) and SPEC.bits == 4 and SPEC.group_size == 4
    assert QuantSpec("int8", (130, 300), (128, 128)).grid == (2, 3)


@pytest.mark.parametrize("wrong", [{"qtype": "int3"}, {"shape": (0, 4)}, {"group_shape": (1, -1)}])
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SPEC.replace(**wrong)


@pytest.mark.parametrize("k", [1, 2, 7, 8])
@pytest.mark.parametrize("xp", [np, jnp])
def test_packing_round_trip(xp: Any, k: int) -> None:
    q = np.random.default_rng(k).integers(0, 16, (3, k)).astype(np.uint8)
    packed = pack_uint4(xp.asarray(q))
    assert packed.shape == (3, -(-k // 2)) and packed.dtype == np.uint8
    assert packed[0, 0] == q[0, 0] + (16 * q[0, 1] if k > 1 else 0)
    np.testing.assert_array_equal(unpack_uint4(packed, k), q)


def random_tensor(qtype: Any, group: tuple[int, int], zero: Any, perm: bool) -> tuple[QuantizedTensor, np.ndarray]:
    """A tensor and its W, the latter one element at a time from the words of QuantSpec."""
    rng, (n, k) = np.random.default_rng(0), (6, 10)
    spec = QuantSpec(qtype, (n, k), group, zero)
    low, high = {"uint4": (0, 16), "uint8": (0, 256), "int8": (-128, 128), "float8_e4m3fn": (-400, 400)}[qtype]
    q = rng.integers(low, high, (n, k)).astype(ml_dtypes.float8_e4m3fn if qtype == "float8_e4m3fn" else np.int16)
    scale = rng.uniform(0.1, 1, spec.grid).astype(np.float32)
    zeros = rng.integers(0, 16, spec.grid).astype(np.uint8) if zero == "int" else rng.normal(size=spec.grid)
    order = rng.permutation(k)
    w = np.zeros((n, k), np.float32)
    middle = {"uint4": 8, "uint8": 128}.get(qtype, 0)
    for i in range(n):
        for j in range(k):
            at = i // group[0], j // group[1]
            value = np.float32(q[i, j]) - np.float32(zeros[at] if zero == "int" else middle)
            value = value * scale[at]
            w[i, order[j] if perm else j] = value + np.float32(zeros[at]) if zero == "offset" else value
    stored = (
        pack_uint4(q.astype(np.uint8))
        if qtype == "uint4"
        else q.astype({"int8": np.int8, "uint8": np.uint8}.get(qtype, q.dtype))
    )
    kept = None if zero == "none" else zeros if zero == "int" else zeros.astype(np.float32)
    arrays = [stored, scale, kept, order.astype(np.int32) if perm else None, None]
    return QuantizedTensor(*(None if a is None else jnp.asarray(a) for a in arrays), spec=spec), w


@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize(
    ("qtype", "group", "zero"),
    [
        ("uint4", (1, 4), "none"),
        ("uint4", (1, 4), "int"),
        ("uint4", (1, 10), "offset"),
        ("uint8", (1, 4), "none"),
        ("uint8", (1, 4), "int"),
        ("int8", (1, 10), "none"),
        ("float8_e4m3fn", (6, 10), "none"),
        ("float8_e4m3fn", (4, 4), "none"),
    ],
)
def test_dequantize(qtype: str, group: tuple[int, int], zero: str, perm: bool) -> None:
    tensor, w = random_tensor(qtype, group, zero, perm)
    np.testing.assert_array_equal(dequantize(tensor), w)
    assert dequantize(tensor, jnp.bfloat16).dtype == jnp.bfloat16


def test_a_kernel_layout_is_not_dequantized() -> None:
    tensor, _ = random_tensor("uint4", (1, 4), "none", False)
    with pytest.raises(ValueError, match="to_canonical"):
        dequantize(tensor.replace(spec=tensor.spec.replace(layout="somebody's")))


def test_pytree() -> None:
    tensor, w = random_tensor("uint4", (1, 4), "int", True)
    leaves, structure = jax.tree.flatten(tensor)
    assert len(leaves) == 4 and jax.tree.unflatten(structure, leaves).spec == tensor.spec
    assert tensor.nbytes == 6 * 5 + 6 * 3 * 4 + 6 * 3 + 10 * 4 and tensor.shape == (6, 10)
    # Compiled, the multiplication and the subtraction may be contracted: the last bit may differ.
    np.testing.assert_allclose(jax.jit(dequantize)(tensor), w, rtol=2e-7)
