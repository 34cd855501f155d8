"""The path without a kernel: the same product block by block as at once, and never the whole matrix in memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.ops.device import use_device
from jqserve.ops.generic import ALIGNED, BLOCK_BYTES, generic_matmul
from jqserve.ops.kernels import GENERIC, kernel
from jqserve.ops.layouts import needs_generic
from jqserve.ops.linear import linear
from jqserve.quant import QuantizedTensor, QuantSpec, dequantize
from pallas_kernels import KNOWN_DEVICES
from tests.models.tiny import Scheme, random_weight
from tests.pallas_kernels.aot import compile_for_h200

N, K = 5 * ALIGNED + 8, 240  # the last block overlaps the one before

SCHEMES = {
    "nf4": Scheme("nf4", (1, 64)),
    "fp4": Scheme("fp4", (1, 64)),
    "Q2_K": Scheme("uint4", (1, 16), zero="offset"),
    "Q3_K": Scheme("uint4", (1, 16)),
    "Q5_1, Q5_K": Scheme("uint8", (1, 32), zero="offset"),
    "Q6_K": Scheme("int8", (1, 16)),
    "odd groups": Scheme("uint4", (1, 40), zero="int"),
    "act-order": Scheme("uint4", (1, 40), zero="int", perm=True),
    "blocks": Scheme("float8_e4m3fn", (128, 128)),
    "one scale": Scheme("float8_e4m3fn", (-1, -1)),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_blocks_are_the_whole(name: str) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, N, K, SCHEMES[name])
    x = jnp.asarray(rng.normal(size=(3, K)).astype(np.float32))
    expected = np.asarray(x) @ np.asarray(dequantize(weight)).T
    for blocks in (1, 2, 100):
        got = generic_matmul(x, weight, block_bytes=blocks * ALIGNED * K * 4)
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def abstract(name: str, n: int, k: int) -> QuantizedTensor:
    weight = jax.eval_shape(lambda: random_weight(np.random.default_rng(0), n, k, SCHEMES[name]))
    assert isinstance(weight, QuantizedTensor)
    return weight


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - {"blocks", "one scale"}))
def test_the_dense_matrix_never_exists(name: str) -> None:
    """float8 is left out: XLA for the CPU cannot cut it and widens all of it; there this path takes none."""
    n, k = 16 * ALIGNED, 960

    def scratch(block_bytes: int) -> int:
        """Bytes that the compiled step takes beside its arguments and results."""
        product = jax.jit(functools.partial(generic_matmul, block_bytes=block_bytes))
        compiled = product.lower(jax.ShapeDtypeStruct((1, k), jnp.bfloat16), abstract(name, n, k)).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    dense = 2 * n * k
    assert scratch(dense) >= dense  # at once: what this guards against is seen
    assert scratch(dense // 16) < dense / 2  # XLA for the CPU makes float32 of a block before it is bfloat16


@pytest.mark.parametrize("name", ["nf4", "blocks", "odd groups"])
def test_nor_on_a_gpu(name: str) -> None:
    """The gate and up projections of an 8B model, compiled for an H200: 4 to 28 MiB, of a matrix of 224."""
    n, k = 28_672, 3_840  # 4,096 is no multiple of 40
    for rows in (1, 256):
        compiled = compile_for_h200(generic_matmul, jax.ShapeDtypeStruct((rows, k), jnp.bfloat16), abstract(name, n, k))
        results = 2 * rows * n
        assert compiled.executable.memory_analysis().temp_size_in_bytes < 2 * BLOCK_BYTES + results


def spec_of(name: str) -> QuantSpec:
    scheme = SCHEMES[name]
    group = (N if scheme.group[0] < 1 else scheme.group[0], K if scheme.group[1] < 1 else scheme.group[1])
    return QuantSpec(scheme.qtype, (N, K), group, scheme.zero)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("nf4", ("h200", "a100", "cpu")),
        ("Q5_1, Q5_K", ("h200", "a100", "cpu")),
        ("odd groups", ("h200", "a100")),
        ("Q2_K", ("a100",)),
        ("Q6_K", ("a100",)),
        ("one scale", ("a100",)),
    ],
)
def test_the_plan_names_it(name: str, devices: tuple[str, ...]) -> None:
    """nf4 and the like everywhere; groups that no kernel takes on a GPU; what has a kernel where there is none."""
    spec = spec_of(name)
    for word in ("h200", "a100", "cpu"):
        device = KNOWN_DEVICES[word]
        assert needs_generic(spec, device) == (word in devices)
        assert (kernel(spec, 1, "bfloat16", "float32", device) == GENERIC) == (word in devices)


def test_a_step_traced_for_a_gpu_takes_it() -> None:
    """Not only the plan: the product of odd groups, traced for an A100, is a loop, and on a CPU it is not."""
    for name, n, loop in (("a100", 65_536, True), ("cpu", 65_544, False)):  # a trace is kept by its shapes
        x = jax.ShapeDtypeStruct((1, 320), jnp.bfloat16)
        with use_device(KNOWN_DEVICES[name]):
            text = jax.jit(lambda x, w: linear(x, w)).lower(x, abstract("odd groups", n, 320)).as_text()
        assert ("stablehlo.while" in text) == loop
