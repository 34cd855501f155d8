"""Why a module stays unquantized: every reader says by which line of its config, and no reader says it of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jqserve.checkpoint.forecast import forecast
from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.opening import open_model
from jqserve.checkpoint.quant_config import quant_plan
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.readers.gguf import GgufPlan
from jqserve.quantize.described import Described
from tests.checkpoint import configs as c
from tests.checkpoint import tiny
from tests.checkpoint.flag_table import CHECKPOINTS

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"
PACKED = ("pack-quantized", c.weights(4, "int", "group", 128))
INT8 = {"_type": "Int8WeightOnlyConfig", "_data": {}}

#: quantization_config -> module -> the reason, "" where it is quantized
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, str]]] = {
    "none": (None, {UP: "the checkpoint is not quantized", HEAD: "the checkpoint is not quantized"}),
    "awq": (
        c.awq(modules_to_not_convert=["layers.0.mlp"]),
        {UP: "modules_to_not_convert has 'layers.0.mlp'", DOWN: "", HEAD: "AWQ leaves the head as it is"},
    ),
    "gptq": (
        c.gptq(dynamic={r"+:.*layers\.1\..*": {"bits": 8}, r"-:.*up_proj": {}}),
        {UP: "dynamic has '-:.*up_proj'", DOWN: "", HEAD: "lm_head is false: the head is left as it is"},
    ),
    "gptq, blocks": (
        c.gptq(modules_in_block_to_quantize=[["mlp.up_proj"]]),
        {UP: "", DOWN: "modules_in_block_to_quantize does not have it"},
    ),
    "compressed-tensors": (
        c.compressed(*PACKED, ignore=["lm_head", "re:.*up_proj"]),
        {UP: "ignore has 're:.*up_proj'", DOWN: "", HEAD: "ignore has 'lm_head'"},
    ),
    "compressed-tensors, targets": (
        c.compressed(
            *PACKED,
            config_groups={"g": {"targets": ["re:.*up_proj"], "weights": PACKED[1], "format": PACKED[0]}},
        ),
        {UP: "", DOWN: "no group of config_groups targets it"},
    ),
    "fp8": (
        c.fp8(modules_to_not_convert=["up_proj"], ignored_layers=[DOWN]),
        {
            UP: "modules_to_not_convert has 'up_proj'",
            DOWN: f"ignored_layers has '{DOWN}'",
            HEAD: "fp8 checkpoints leave the head as it is",
        },
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["up_proj"]},
        {UP: "llm_int8_skip_modules has 'up_proj'", DOWN: "", HEAD: "bitsandbytes leaves the head as it is"},
    ),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": INT8}, "modules_to_not_convert": ["model.layers.1"]},
        {UP: "", DOWN: "modules_to_not_convert has 'model.layers.1'", HEAD: "torchao leaves the head as it is"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_line_of_the_config(case: str, tmp_path: Path) -> None:
    config, reasons = CASES[case]
    plan = quant_plan(Described({"quantization_config": config} if config else {}, tmp_path))  # type: ignore[arg-type]
    for module, reason in reasons.items():
        assert plan.why_dense(module) == reason
        assert (plan.scheme(module) == DENSE) == bool(reason)


def test_gguf() -> None:
    plan = GgufPlan({UP: "Q4_0", DOWN: "F16"})
    assert plan.why_dense(UP) == "" and plan.why_dense(DOWN) == "the file stores it as F16"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_dense_module_has_a_reason(name: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path, *CHECKPOINTS[name], num_hidden_layers=1, hidden_size=256)
    with Checkpoint(made.path) as checkpoint:
        found = forecast(open_model(checkpoint, None, "config", None))
    dense = {row.source for row in found.plan.rows if row.spec is None}
    assert dense and all("{" not in source or name.startswith("unquantized") for source in dense)
    assert set(found.unquantized) >= {source for source in dense if "{" not in source}
    assert all(found.unquantized.values())


@pytest.mark.parametrize(("flag", "reason"), [("fp8", "the head is never quantized while loading"), (None, "the ch")])
def test_the_head_of_an_unquantized_checkpoint(flag: str | None, reason: str, tmp_path: Path) -> None:
    with Checkpoint(tiny.make(tmp_path, num_hidden_layers=1, tie_word_embeddings=False).path) as checkpoint:
        found = forecast(open_model(checkpoint, None, "config", flag))
    assert found.unquantized["lm_head"].startswith(reason)
    assert (UP in found.unquantized) == (flag is None)
