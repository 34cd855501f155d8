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
from tests.checkpoint import configs as c
from tests.checkpoint import tiny

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
