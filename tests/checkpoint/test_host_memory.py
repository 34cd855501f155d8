"""Host memory while loading stays near the largest module, whatever the size of the model."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jqserve.checkpoint import store
from jqserve.checkpoint.convert import load
from jqserve.checkpoint.forecast import forecast
from jqserve.checkpoint.open import open_checkpoint
from jqserve.checkpoint.opening import open_model
from tests.checkpoint import configs as c
from tests.checkpoint import gguf_files, tiny

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 256}
CASES: dict[str, tuple[tiny.Maker, dict[str, Any] | None, dict[str, Any], float]] = {
    # The factor: one module read ahead, one raw, one built; casts and nibbles are wider than what is stored.
    "bf16": (tiny.dense, None, {}, 3.2),
    "bf16, online fp8": (tiny.dense, None, {"quantization": "fp8"}, 4.5),
    "awq": (tiny.awq(), c.awq(), {}, 4.5),
    "gptq": (tiny.gptq(sym=False), c.gptq(sym=False), {}, 3.5),
    "packed": (tiny.packed(), c.compressed("pack-quantized", c.weights(4, "int", "group", 128)), {}, 3.2),
    "fp8": (
        tiny.eight(),
        c.compressed("float-quantized", c.weights(8, "float", "channel"), c.inputs("float")),
        {},
        3.2,
    ),
}


def forget(weight: Any) -> str:
    """Stands for a device: what was placed no longer counts as host memory."""
    jax.tree.map(np.asarray, weight)
    return "on the device"


def module_bytes(made: tiny.Tiny) -> int:
    """The largest of what is loaded at a time, as it lies in the file: gate and up together here."""
    sizes = {name: array.nbytes for name, array in made.tensors.items()}
    return sum(size for name, size in sizes.items() if ".0.mlp.gate" in name or ".0.mlp.up" in name)


@pytest.mark.parametrize("case", CASES)
def test_peak_is_a_few_modules_and_not_the_model(case: str, tmp_path: Path) -> None:
    maker, quantization, options, factor = CASES[case]
    made = tiny.make(tmp_path, maker, quantization, num_hidden_layers=10, **SIZES)
    largest, model = module_bytes(made), sum(a.nbytes for a in made.tensors.values())
    path = str(made.path)
    del made
    load(path, device_put=forget, decode="host", **options)  # imports and caches are not what is measured
    tracemalloc.start()
    load(path, device_put=forget, decode="host", **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    slack = 400_000  # headers, plan, config
    assert model > 2 * (factor * largest + slack), "the model is too small for the test to mean anything"
    assert peak < factor * largest + slack, f"peak {peak / largest:.2f} modules of {largest} bytes (model {model})"


def test_convert_streams_by_layers(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "hf", num_hidden_layers=16, **SIZES)
    layer = sum(a.nbytes for n, a in made.tensors.items() if ".layers.0." in n)
    path = made.path
    del made
    store.convert(path, tmp_path / "first")
    tracemalloc.start()
    store.convert(path, tmp_path / "second")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    load(str(tmp_path / "second"), device_put=forget)
    restored = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * layer, f"convert: {peak / layer:.2f} layers"
    assert restored < 4.5 * layer, f"restore: {restored / layer:.2f} layers"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_an_embedding_in_blocks_stays_within_the_plan(kind: str, tmp_path: Path) -> None:
    """Every real GGUF has one; it is handed over as float32, several times what lies in the file."""
    rows, (block, width) = 40_000, gguf_files.SIZES[kind]
    blocks = gguf_files.model(kind)["blk.0.attn_q.weight"][2]
    data = blocks * (rows * gguf_files.HIDDEN // block * width // len(blocks))
    embedding = (kind, (len(data) // width * block // gguf_files.HIDDEN, gguf_files.HIDDEN), data)
    path = gguf_files.write(tmp_path / "m.gguf", kind, **{"token_embd.weight": embedding})
    with open_checkpoint(path) as checkpoint:
        found = forecast(open_model(checkpoint, "bfloat16", "config", None))
    _, host = found.peak_bytes(found.plan.bytes + found.vectors)
    del embedding, data, blocks
    load(str(path), dtype="bfloat16", device_put=forget, decode="host")
    tracemalloc.start()
    load(str(path), dtype="bfloat16", device_put=forget, decode="host")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.5 * host < peak < host + 400_000, f"{peak:,} bytes, the plan says {host:,}"
