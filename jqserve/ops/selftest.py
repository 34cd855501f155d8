"""The self-test at load: each kernel that will run, once on real weights, against plain dequantization."""

from __future__ import annotations

import concurrent.futures
import contextvars
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.errors import EngineFailedError
from jqserve.ops.compiler_options import compiler_options
from jqserve.ops.device import current_device
from jqserve.ops.kernels import kernel
from jqserve.ops.linear import linear
from jqserve.ops.relayout import to_canonical
from jqserve.quant import ActivationSpec, QuantizedTensor, dequantize

#: Largest difference allowed, as a share of the largest output: bfloat16 rounds weights, inputs and results by 2^-9
#: each and a quantized input may fall to the other side of a tie; a wrong nibble or scale gives 0.3 and more.
BOUNDS = {"bfloat16": 2e-2, "float16": 1e-2, "float32": 5e-3}


#: A kernel that takes a few rows is tested with so many where it can be: more of its tile is then looked at.
FEW_ROWS = 16
#: (name, what lowers it) -> the executable; the name says all that goes into it but our source and the device
Compile = Callable[[str, Callable[[], jax.stages.Lowered]], Any]


def self_test(
    weights: Iterable[tuple[str, QuantizedTensor]],
    dtype: str,
    rows: tuple[int, ...],
    compile_program: Compile = lambda name, lower: lower().compile(),
) -> Iterator[str]:
    """Tests the first weight of each distinct spec, permuted or not, of each dtype of scales; yields a line for each.

    rows     of the inputs [M, K] that will come, ascending, the prefill's last: each kernel that one of them takes is
             tested once (`telling_rows`), and the last M
    weights  (path, weight in kernel layout, on the device); dtype: of the activations; compile_program: may keep them.
    Raises EngineFailedError naming the module, the kernel and the difference. Takes, for a moment, a float32 copy of
    the one weight at hand.
    """
    first: dict[Any, tuple[str, QuantizedTensor]] = {}
    for path, weight in weights:
        leaves, kind = jax.tree.flatten(weight)  # kind has the spec, and which of perm and the zeros there are
        first.setdefault((kind, tuple(str(leaf.dtype) for leaf in leaves)), (path, weight))
    with concurrent.futures.ThreadPoolExecutor(max(1, os.cpu_count() or 1), "self-test") as pool:
        tests = [
            (
                path,
                weight,
                {
                    m: pool.submit(contextvars.copy_context().run, _compiled, weight, dtype, m, compile_program)
                    for m in telling_rows(weight, dtype, rows)
                },
            )
            for path, weight in first.values()
        ]
        for path, weight, programs in tests:  # one after the other: each takes a float32 copy of its weight
            errors = {m: float(program.result()(_inputs(weight, dtype, m), weight)) for m, program in programs.items()}
            canonical = jax.eval_shape(to_canonical, weight)
            spec, scales = canonical.spec, str(canonical.scale.dtype)
            for m, error in errors.items():
                if not error <= BOUNDS[dtype]:
                    raise EngineFailedError(
                        f"self-test: {path}: {kernel(spec, m, dtype, scales, current_device())} with {m} rows differs "
                        f"from the dequantized weight by {error:.2g} of the largest output, {BOUNDS[dtype]:.2g} is "
                        "allowed. Not serving wrong numbers: please report this; --no-self-test serves anyway"
                    )
            yield f"{path}: within {max(errors.values()):.1e} of the largest output"


def telling_rows(weight: QuantizedTensor, dtype: str, rows: tuple[int, ...]) -> tuple[int, ...]:
    """Of `rows`, one for every kernel: FEW_ROWS or the next fewer, else the fewest that take it; and the last."""
    canonical, found = jax.eval_shape(to_canonical, weight), dict[str, int]()
    for m in rows:
        name = kernel(canonical.spec, m, dtype, str(canonical.scale.dtype), current_device())
        if name not in found or m <= FEW_ROWS:
            found[name] = m
    return tuple(dict.fromkeys([*found.values(), rows[-1]]))


def worth_testing(weights: Iterable[tuple[str, QuantizedTensor]]) -> bool:
    """False on a CPU, where only the XLA references run, which are what a kernel would be compared with. On a GPU also
    what has no kernel is compiled by another compiler than the one that the tests have: the generic path, fp8 by XLA.
    """
    return current_device().platform != "cpu" and any(True for _ in weights)


def _inputs(weight: QuantizedTensor, dtype: str, m: int) -> jax.Array:
    x = np.random.default_rng(m).normal(size=(m, weight.shape[1])).astype(np.float32)
    return jnp.asarray(x).astype(dtype)


def _compiled(weight: QuantizedTensor, dtype: str, m: int, compile_program: Compile) -> Any:
    """(inputs, weight) -> the largest difference as a share of the largest output. In a thread: XLA compiles without
    the interpreter's lock."""

    def lower() -> jax.stages.Lowered:
        difference = jax.jit(lambda x, w: _difference(x, w), compiler_options=compiler_options())
        return difference.lower(jax.ShapeDtypeStruct((m, weight.shape[1]), dtype), weight)

    arrays = [f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(weight)]
    facts = f"{weight.spec} {arrays} {dtype}"
    return compile_program(f"self_test_{m}_{hashlib.sha256(facts.encode()).hexdigest()[:16]}", lower)


def _difference(x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    got = linear(x, weight).astype(jnp.float32)
    dense = dequantize(to_canonical(weight))
    seen = _quantized(x.astype(jnp.float32), weight.spec.activation, weight.input_scale)
    expected = jnp.matmul(seen, dense.T, precision=jax.lax.Precision.HIGHEST)
    largest = jnp.abs(expected).max()
    return jnp.abs(got - expected).max() / jnp.where(largest > 0, largest, 1.0)  # all weights of a module may be zero


def _quantized(x: jax.Array, activation: ActivationSpec, static: Any) -> jax.Array:
    """x as the kernel sees it after quantization, in float32, by the words of ActivationSpec."""
    if activation.kind == "none":
        return x
    m, k = x.shape
    block = activation.block if activation.kind == "dynamic_block" and activation.block else k
    runs = jnp.pad(x, ((0, 0), (0, -k % block))).reshape(m, -1, block)
    scale = jnp.abs(runs).max(axis=2, keepdims=True) / activation.divisor
    scale = jnp.where(scale == 0, 1.0, scale)
    if activation.kind == "static_tensor":
        scale = jnp.full_like(scale, static.reshape(()))
    if activation.qtype == "int8":
        q = jnp.clip(jnp.round(runs / scale), -128, 127)
    else:
        narrow = jnp.clip(runs / scale, -448, 448).astype(jnp.float8_e4m3fn)
        # Without the barrier XLA drops the two conversions: excess precision is allowed by default.
        q = jax.lax.optimization_barrier(narrow).astype(jnp.float32)
    return (q * scale).reshape(m, -1)[:, :k]
