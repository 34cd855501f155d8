"""sample: the XLA form and the kernel's program, run in numpy, against a sort in float64; the kernel's machine code."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KNOWN_DEVICES, explain, use_device
from pallas_kernels.sample import mosaic_sm90, noise, reference
from pallas_kernels.sample.api import sample
from pallas_kernels.sample.cases import CASES, Case
from pallas_kernels.sample.exchange import Place
from pallas_kernels.sample.problem import CLUSTER, THREADS, problem
from pallas_kernels.sample.program import sample_row
from tests.pallas_kernels.aot import compile_for_h200
from tests.pallas_kernels.lockstep import Lockstep, Race
from tests.pallas_kernels.sample_oracle import arguments, check


def run_program(given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """tokens, totals, thresholds, and the cluster barriers of the last row."""
    rows, vocabulary = given["logits"].shape
    p = problem(rows, vocabulary)
    out = {"tokens": np.full(rows, -7, np.int32), "totals": np.zeros(rows, np.float32)}
    out["thresholds"] = np.full(rows, np.nan, np.float32)
    for row in range(rows):
        ops = Lockstep(given | out, CLUSTER, THREADS, p.smem_bytes)
        thread = ops.special("tid.x")
        place = Place(ops, p, ops.const_i32(row), ops.special("cluster_ctarank"), thread, thread & 31, thread >> 5)
        sample_row(place)
    return out["tokens"], out["totals"], out["thresholds"], ops.cluster_barriers


@functools.cache
def jitted(implementation: str, device: str) -> Any:
    def call(**given: Any) -> Any:
        with use_device(KNOWN_DEVICES[device]):
            return sample(**given, implementation=implementation)

    return jax.jit(call)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_program(case: Case) -> None:
    given = arguments(case)
    (token,), (total,), (threshold,), _ = run_program(given)
    check(case, given, int(token), float(total), float(threshold))


@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla(case: Case, device: str) -> None:
    """As on a CPU, and as on a GPU: four bits of a threshold a pass, and no conditionals."""
    if device == "h200" and case.vocabulary > 6000:
        pytest.skip("minutes on a CPU")
    given = arguments(case)
    (token,), (total,), (threshold,) = jitted("xla", device)(**given)
    check(case, given, int(token), float(total), float(threshold))


def test_rows_do_not_mind_their_neighbours() -> None:
    cases = [Case("peaked", 5001, 0.6, 0, 0.9), Case("flat", 5001), Case("nan", 5001), Case("ties", 5001, 0.0, 9)]
    alone = [arguments(case, seed) for seed, case in enumerate(cases)]
    together = {name: np.concatenate([given[name] for given in alone]) for name in alone[0]}
    tokens, totals, thresholds, _ = run_program(together)
    for i, given in enumerate(alone):
        token, total, threshold, _ = run_program(given)
        np.testing.assert_array_equal((tokens[i], totals[i], thresholds[i]), (token[0], total[0], threshold[0]))
    want = jitted("xla", "cpu")(**together)[0]
    assert tokens.tolist() == np.asarray(want).tolist()


def test_random_rows_give_the_tokens_of_xla() -> None:
    """Many draws, at all cuts; none of these seeds has a token at the edge of top-p."""
    rng = np.random.default_rng(5)
    rows, vocabulary = 16, 5001
    given = {
        "logits": (rng.normal(size=(rows, vocabulary)) * rng.uniform(0.5, 6, (rows, 1))).astype(np.float32),
        "temperature": rng.uniform(0.3, 2, rows).astype(np.float32),
        "top_k": np.where(rng.uniform(size=rows) < 0.5, rng.integers(1, 200, rows), 0).astype(np.int32),
        "top_p": np.where(rng.uniform(size=rows) < 0.7, rng.uniform(0.3, 1, rows), 1).astype(np.float32),
        "min_p": np.where(rng.uniform(size=rows) < 0.3, rng.uniform(0, 0.2, rows), 0).astype(np.float32),
        "seed": rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
        "position": rng.integers(0, 2**17, rows).astype(np.int32),
    }
    tokens, totals, thresholds, _ = run_program(given)
    want = [np.asarray(a) for a in jitted("xla", "cpu")(**given)]
    np.testing.assert_array_equal(tokens, want[0])
    np.testing.assert_allclose(totals, want[1], rtol=1e-6)
    x = given["logits"] / given["temperature"][:, None]
    np.testing.assert_array_equal(x >= thresholds[:, None], x >= want[2][:, None])


@pytest.mark.parametrize(
    ("case", "most"),
    [
        (Case("peaked", 128256, 0.6, 0, 0.9), 4),
        (Case("peaked", 128256, 1.0, 40, 0.95), 4),
        (Case("normal", 128256, 1.0, 50), 4),
        (Case("peaked", 128256, 1.0, 0, 1.0, 0.05), 4),
        (Case("normal", 128256), 3),
        (Case("normal", 128256, 0.0), 2),
        (Case("normal", 128256, 2.0, 0, 0.95), 14),
    ],
    ids=str,
)
def test_exchanges_of_a_row(case: Case, most: int) -> None:
    """A cluster barrier each, the latency of a row: maximum, sums, one pass over the row, the candidates."""
    assert run_program(arguments(case))[3] <= most


def test_noise_is_that_of_jax() -> None:
    """The bits are the same; numpy's logarithm differs from XLA's in the last ones."""
    seed, position = np.array([0x9E3779B9, 0x12345678], np.uint32), 70_000
    ops = Lockstep({}, CLUSTER, THREADS, 4)
    token = ops.special("tid.x")
    key = noise.fold_in(ops, (ops.const_i32(int(seed[0])), ops.const_i32(int(seed[1]))), ops.const_i32(position))
    folded = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32"), position)
    assert [int(word.a[0]) for word in key] == np.asarray(jax.random.key_data(folded)).tolist()
    got = noise.gumbel(ops, key, token).a[:THREADS]
    np.testing.assert_allclose(got, reference.gumbel(jnp.asarray(seed), jnp.int32(position), THREADS), atol=1e-6)


def test_lockstep_sees_races() -> None:
    """The emulator's own test: a word that another warp wrote, with and without a barrier."""
    for barrier in (False, True):
        ops = Lockstep({}, 1, 64, 512)
        thread = ops.special("tid.x")
        ops.store_shared_word(thread * 4, thread)
        if barrier:
            ops.barrier()
            ops.load_shared_word((ops.const_i32(63) - thread) * 4)
            continue
        with pytest.raises(Race):
            ops.load_shared_word((ops.const_i32(63) - thread) * 4)


@pytest.mark.parametrize(("vocabulary", "registers"), [(128256, 64), (151936, 64), (262144, 128), (50257, 128)])
def test_machine_code(vocabulary: int, registers: int) -> None:
    """64 registers and 87 KB: two blocks of 512 threads on a multiprocessor."""
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments(Case("flat", vocabulary)).values()]
    compiled = compile_for_h200(mosaic_sm90.sample, *given)
    assert compiled.spill_bytes == 0 and compiled.stack_bytes == 0 and compiled.registers <= registers
    assert ".reqnctapercluster 8" in compiled.ptx
    assert vocabulary > 200_000 or 2 * problem(1, vocabulary).smem_bytes < 227 * 1024


def test_who_takes_what() -> None:
    def choice(vocabulary: int, rows: int = 4, device: str = "h200") -> Any:
        shape = jax.ShapeDtypeStruct
        floats, ints = shape((rows,), jnp.float32), shape((rows,), jnp.int32)
        args = (
            shape((rows, vocabulary), jnp.float32),
            floats,
            ints,
            floats,
            floats,
            shape((rows, 2), jnp.uint32),
            ints,
        )
        return explain("sample", *args, device=KNOWN_DEVICES[device])

    for vocabulary in (1025, 32000, 50257, 128256, 151936, 262144):
        assert choice(vocabulary).chosen == "mosaic_sm90"
    for refused, reason in (
        (choice(1024), "more than 1024"),
        (choice(500_000), "shared memory"),
        (choice(32000, device="b200"), "9.0"),
    ):
        assert refused.chosen == "xla" and reason in dict(refused.refused)["mosaic_sm90"]


def test_wrong_arguments_are_named() -> None:
    given = {name: jnp.asarray(a) for name, a in arguments(CASES[0]).items()}
    for change, message in (
        ({"logits": given["logits"].astype(jnp.bfloat16)}, "logits must be float32"),
        ({"top_k": given["top_p"]}, "top_k must be int32"),
        ({"seed": given["seed"][:, :1]}, "seed must be uint32"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(**(given | change))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernel")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_device(case: Case) -> None:
    given = arguments(case)
    (token,), (total,), (threshold,) = jitted("mosaic_sm90", "h200")(**given)
    check(case, given, int(token), float(total), float(threshold))
