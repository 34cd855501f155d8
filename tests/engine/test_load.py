"""What loading an engine says on the way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from jqserve.checkpoint.safetensors_file import SafetensorsFile
from jqserve.engine.config import EngineConfig
from jqserve.engine.load import load_engine
from tests.checkpoint import configs, tiny

TOLD = {
    "gptq_marlin": "the name is accepted for gptq; what runs is w4a16/xla",
    "gptq": "the checkpoint is that already",
}


@pytest.mark.parametrize("name", TOLD)
def test_a_name_of_other_servers_is_told_the_kernel_that_runs(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny.make(tmp_path, tiny.gptq(), configs.gptq()).path
    with caplog.at_level(logging.INFO):
        load_engine(EngineConfig(model_path=str(path), quantization=name, disable_warmup=True, num_pages=8))
    told = [message for message in caplog.messages if message.startswith(f"--quantization {name}:")]
    assert told == [f"--quantization {name}: {TOLD[name]}"]  # one line


def told_while_loading(path: Path, **options: Any) -> list[tuple[str, str, dict[str, Any]]]:
    told: list[tuple[str, str, dict[str, Any]]] = []
    config = EngineConfig(model_path=str(path), disable_warmup=True, num_pages=8, **options)
    load_engine(config, lambda *report: told.append(report))
    return told


def test_every_modules_fate_is_told_before_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization = configs.gptq(dynamic={r"-:.*down_proj": {}})
    made = tiny.make(tmp_path, tiny.gptq(), quantization)
    for name in [name for name in made.tensors if ".down_proj." in name]:
        del made.tensors[name]
    for name in [name for name in made.weights if name.endswith("down_proj")]:
        made.tensors[f"{name}.weight"] = made.weights[name].astype(made.tensors["model.norm.weight"].dtype)
    made.save()
    told: list[str] = []
    real = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: told.append("read") or real(self, name))
    config = EngineConfig(model_path=str(made.path), disable_warmup=True, num_pages=8)
    load_engine(config, lambda stage, text, _: told.append(text if stage in ("forecast", "plan") else stage))
    first = told.index("read")
    assert first == 1 and "load plan: gptq" in told[0] and "w4a16/xla" in told[0] and "of the host" in told[0]
    assert r"unquantized: model.layers.{0-1}.mlp.down_proj: dynamic has '-:.*down_proj'" in told[0]
    assert "loaded as planned" in told[first:]  # and no second table


def test_what_headers_do_not_show_is_told_when_it_is_loaded(tmp_path: Path) -> None:
    """Two static input scales that differ keep q, k and v apart: that is in the values."""
    weights, inputs = configs.weights(8, "float", "tensor"), configs.inputs("float", static=True)
    made = tiny.make(
        tmp_path, tiny.eight(shape="tensor", static=True), configs.compressed("float-quantized", weights, inputs)
    )
    made.tensors["model.layers.0.self_attn.k_proj.input_scale"] = made.tensors["model.norm.weight"][:1] * 0 + 1
    made.save()
    told = told_while_loading(made.path)
    plans = [text for stage, text, _ in told if stage in ("forecast", "plan")]
    assert "layers.0.attn.qkv" not in plans[1] and "kept apart: input scales differ" in plans[1]
    assert "kept apart" not in plans[0]
