"""How many kernels a decode step has on an H200, counted in the program compiled for one without a device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jqserve.engine.batch import StepShape, packed_size
from jqserve.engine.buckets import Bucket
from jqserve.engine.cache import cache_shape
from jqserve.engine.slots import empty
from jqserve.engine.split import begin, first_layers, forward
from jqserve.engine.step import make_state, run_step
from jqserve.engine.traceable import Traceable
from jqserve.engine.variant import Variant
from jqserve.models.build import build, split
from jqserve.models.config import ModelConfig, RopeConfig
from jqserve.ops import ahead
from jqserve.ops.compiler_options import compiler_options
from jqserve.ops.relayout import relayout_leaf
from jqserve.quant import ActivationSpec, QuantizedTensor, QuantSpec
from pallas_kernels.dispatch import KNOWN_DEVICES, use_device
from tests.pallas_kernels.aot import Compiled, compile_for_h200, h200_sharding

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, DIM, VOCAB, ROWS = 2, 1024, 2048, 8, 2, 128, 2048, 8
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


def fp8_model() -> tuple[ModelConfig, dict]:
    """A small Llama in the FP8 scheme of compressed-tensors (per channel, per token); shapes only."""
    shape = jax.ShapeDtypeStruct
    config = ModelConfig(
        "LlamaForCausalLM", "llama", VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, DIM, 1e-5, RopeConfig(), 4096, False
    )

    def linear(n: int, k: int) -> dict:
        spec = QuantSpec(
            "float8_e4m3fn", (n, k), (1, k), "none", ActivationSpec("dynamic_token", "float8_e4m3fn", 448.0)
        )
        weight = QuantizedTensor(shape((n, k), jnp.float8_e4m3fn), shape((n, 1), jnp.float32), None, None, None, spec)
        return {"weight": jax.eval_shape(lambda w: relayout_leaf(w, KNOWN_DEVICES["h200"]), weight)}

    norm = {"weight": shape((HIDDEN,), jnp.bfloat16)}
    layer = {
        "attn_norm": norm,
        "attn": {"qkv": linear((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), "o": linear(HIDDEN, HEADS * DIM)},
        "mlp_norm": norm,
        "mlp": {"gate_up": linear(2 * FFN, HIDDEN), "down": linear(HIDDEN, FFN)},
    }
    head = {"weight": shape((VOCAB, HIDDEN), jnp.bfloat16)}
    layers = {str(i): layer for i in range(LAYERS)}
    return config, {"embed": head, "layers": layers, "final_norm": norm, "lm_head": head}


def compiled_step(variant: Variant, steps: int = 1, rows: int = ROWS) -> Compiled:
    step = lambda structure, shape, bucket, *a: run_step(structure, shape, bucket, variant, *a)  # noqa: E731
    return compiled_program(step, Bucket(rows, 0, steps), takes_params=variant is not Variant.GREEDY)


def compiled_program(function: Callable[..., Any], bucket: Bucket, *, takes_params: bool) -> Compiled:
    """function(structure, shape, bucket, leaves, kv, state, params, packed)."""
    one = traceable(function, bucket, takes_params=takes_params)
    return compile_for_h200(
        one.function, *one.arguments, donate_argnums=one.donated, compiler_options=compiler_options()
    )


def traceable(function: Callable[..., Any], bucket: Bucket, *, takes_params: bool) -> Traceable:
    with use_device(KNOWN_DEVICES["h200"]):
        config, params = fp8_model()
    structure, leaves = split(build(config, params))
    shape = StepShape(ROWS, 64, 8, 128, VOCAB)
    cache = cache_shape(config, page_size=64, pages=100, dtype="bfloat16")
    state = jax.eval_shape(lambda: make_state(shape))
    given = None
    if takes_params:
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty(ROWS))
    packed = jax.ShapeDtypeStruct((packed_size(shape, bucket),), jnp.int32)
    call = lambda *a: function(structure, shape, bucket, *a)  # noqa: E731
    return Traceable("program", call, (leaves, cache.abstract(), state, given, packed), (1, 2))


def operations(hlo: str, computation: str) -> list[str]:
    """What a computation launches: the operation of each line, a custom call by its target."""
    body = hlo[hlo.index(computation) :]
    body = body[: body.index("\n}")]
    found = []
    for line in body.splitlines():
        if match := re.search(r" = (?:\(.*?\)|\S+) ([\w-]+)\(", line):
            target = re.search(r'custom_call_target="([^"]+)"', line)
            found.append(target[1] if target else match[1])
    return [name for name in found if name not in FREE]


@pytest.mark.slow
def test_a_decode_layer_is_ten_kernels() -> None:
    """norm+quantize, qkv, rotary+KV write, attention, quantize, o, norm+quantize, gate_up, SiLU+quantize, down."""
    launched = operations(compiled_step(Variant.GREEDY).hlo, "\nENTRY")
    assert launched.count("mosaic_gpu_v2") == 10 * LAYERS
    assert set(launched) <= {"mosaic_gpu_v2", "fusion", "custom-call", "copy"} | {"__cublas$gemm", "__cublas$lt$matmul"}
    # Beside the layers: page table, positions, rotary table, embedding, last norm, head, argmax, the token's place.
    assert len(launched) - 10 * LAYERS <= 18, launched


@pytest.mark.slow
def test_a_layer_that_reads_ahead_is_as_many_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of which ask; and the weights are passed to two kernels each as they are, not copied for one."""
    sites = ("attn_norm", "rope", "mlp_norm", "silu")
    monkeypatch.setattr(ahead, "BYTES", dict.fromkeys(sites, 1 << 20))
    jax.clear_caches()  # what is asked for is looked up while tracing
    try:
        compiled = compiled_step(Variant.GREEDY)
    finally:
        jax.clear_caches()
    launched = operations(compiled.hlo, "\nENTRY")
    assert launched.count("mosaic_gpu_v2") == 10 * LAYERS and len(launched) - 10 * LAYERS <= 18, launched
    asking = [part for part in compiled.ptx.split(".visible .entry")[1:] if "cp.async.bulk.prefetch.L2" in part]
    names = {part.split("(")[0].strip() for part in asking}
    assert len(asking) >= len(sites)  # equal kernels are compiled once or more
    assert names == {
        f"{name}_sm90_mosaic_gpu_kernel" for name in ("quantize_residual_norm", "rope_write", "quantize_silu")
    }


@pytest.mark.slow
def test_a_step_lowered_by_another_process_is_the_same() -> None:
    """Kernels, buffers and what is donated; here without the process (`tests/engine/test_lowering`)."""
    step = lambda structure, shape, bucket, *a: run_step(structure, shape, bucket, Variant.SAMPLE, *a)  # noqa: E731
    one = traceable(step, Bucket(ROWS, 0, 2), takes_params=True)
    sharding = h200_sharding()
    on_device = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), one.arguments)
    with use_device(KNOWN_DEVICES["h200"]):
        content = one.exported("cuda")
    lowered = dataclasses.replace(one, arguments=on_device).imported(content)
    there = lowered.compile(compiler_options())
    here = compiled_program(step, Bucket(ROWS, 0, 2), takes_params=True)
    assert operations(there.as_text(), "\nENTRY") == operations(here.hlo, "\nENTRY")
    assert there.as_text().count("mosaic_gpu_v2") == here.hlo.count("mosaic_gpu_v2")
    assert there.memory_analysis().temp_size_in_bytes == here.executable.memory_analysis().temp_size_in_bytes
    assert there.memory_analysis().alias_size_in_bytes == here.executable.memory_analysis().alias_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("variant", [Variant.PLAIN, Variant.SAMPLE])
def test_drawing_a_token_is_one_kernel(variant: Variant) -> None:
    """Behind the penalties and biases; top-p in XLA is two loops of eight passes."""
    launched = operations(compiled_step(variant).hlo, "\nENTRY")
    assert launched.count("mosaic_gpu_v2") == 10 * LAYERS + 1 and "while" not in launched
    # Beside those of a greedy step: what the slots ask, tokens counted, penalties, biases, the token's logprob.
    assert len(launched) - 10 * LAYERS - 1 <= 32, launched


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, ROWS])
def test_the_head_is_a_matmul_of_cublas(rows: int) -> None:
    """Not XLA's reduction of one row, nor a Triton fusion that nobody has tuned: either takes milliseconds."""
    hlo = compiled_step(Variant.GREEDY, rows=rows).hlo
    heads = [line for line in hlo.splitlines() if re.search(rf"f32\[\d+,{VOCAB}\].* custom-call\(", line)]
    assert len(heads) == 1 and "__cublas$" in heads[0]
    assert "__triton_gemm" not in hlo


@pytest.mark.slow
def test_several_steps_copy_no_pages() -> None:
    """The loop carries the pages in place, and its trip count is known to the compiler."""
    hlo = compiled_step(Variant.GREEDY, steps=4).hlo
    assert operations(hlo, "\nENTRY").count("while") == 1
    assert not re.search(r"bf16\[101,2,64,128\]\S* copy\(", hlo)
    assert '"known_trip_count":{"n":"4"}' in hlo


@pytest.mark.slow
@pytest.mark.parametrize("decodes", [0, ROWS])
def test_a_prefill_layer_is_eleven_kernels_beside_decode_rows_and_ten_alone(decodes: int) -> None:
    """With decode rows there is a second attention kernel; XLA hands both a slice of the queries by its address
    (a "dynamic-slice-fusion"), so that only their results are copied together."""
    bucket = Bucket(decodes, 2)
    first_half = lambda structure, shape, bucket, *a: forward(  # noqa: E731
        structure, shape, bucket, bucket.sampled, False, *a, None
    )
    hlo = compiled_program(first_half, bucket, takes_params=True).hlo
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') == (11 if decodes else 10) * LAYERS
    assert operations(hlo, "\nENTRY").count("mosaic_gpu_v2") == (9 if decodes else 10) * LAYERS
    assert len(re.findall(r"bf16\[264,8,128\]\S* concatenate\(", hlo)) == LAYERS * bool(decodes)


@pytest.mark.slow
def test_a_step_cut_between_layers_is_as_many_kernels() -> None:
    """What is computed again in the second program is small: positions, the rotary table, places in the pages."""
    bucket, first = Bucket(ROWS, 0), first_layers(LAYERS)

    def beginning(
        structure: Any, shape: Any, bucket: Any, leaves: Any, kv: Any, state: Any, _: Any, packed: Any
    ) -> Any:
        return begin(structure, shape, bucket, leaves, kv[:first], state, packed)

    def rest(structure: Any, shape: Any, bucket: Any, leaves: Any, kv: Any, *given: Any) -> Any:
        stream = (jnp.ones((ROWS, HIDDEN), jnp.bfloat16),) * 2
        return forward(structure, shape, bucket, ROWS, False, leaves, kv[first:], *given, None, stream)

    programs = [compiled_program(f, bucket, takes_params=True) for f in (beginning, rest)]
    launched = [operations(program.hlo, "\nENTRY") for program in programs]
    assert [names.count("mosaic_gpu_v2") for names in launched] == [10 * first, 10 * (LAYERS - first)]
    assert [len(names) - names.count("mosaic_gpu_v2") for names in launched] <= [12, 16], launched
    assert not any(re.search(r"bf16\[101,2,64,128\]\S* copy\(", program.hlo) for program in programs)
