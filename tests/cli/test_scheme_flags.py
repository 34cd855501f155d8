"""The server's command line down to the engine's options: schemes, KV dtype, self-test, and a .gguf as model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jqserve.cli.server import parser, server_config
from jqserve.engine.config import EngineConfig
from jqserve.errors import JqserveError
from tests.checkpoint import gguf_files as g


def engine_options(*words: str) -> dict[str, Any]:
    options = server_config(parser().parse_args(list(words))).engine
    EngineConfig.from_json(options)  # every key is one of the engine's
    return options


def test_flags_reach_the_engine() -> None:
    assert engine_options("--quantization", "int4-64")["quantization"] == "int4-64"
    assert engine_options("--torchao-config", "int8dq")["quantization"] == "torchao:int8dq"
    assert engine_options("--kv-cache-dtype", "fp8_e4m3")["kv_dtype"] == "fp8_e4m3"
    assert engine_options("--no-self-test")["self_test"] is False and "self_test" not in engine_options()
    assert engine_options("--disable-cuda-graph")["disable_cuda_graph"] is True
    with pytest.raises(JqserveError, match="give one of them"):
        engine_options("--quantization", "int4", "--torchao-config", "int8dq")
    with pytest.raises(JqserveError, match=r"mem_fraction_static 0\.0 is not in"):
        engine_options("--mem-fraction-static", "0")
    with pytest.raises(JqserveError, match="--model-path is empty"):  # and not the demo model
        engine_options("--model-path", "")


def test_a_gguf_brings_its_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tokens = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    g.write(path, fields=tokens)
    options = engine_options("--model-path", str(path))
    assert options["model_path"] == str(path)
    assert (Path(options["tokenizer_path"]) / "tokenizer.json").is_file()
    g.write(path)
    with pytest.raises(JqserveError, match=r"holds no tokenizer.*--tokenizer-path"):
        engine_options("--model-path", str(path))
    (tmp_path / "tokenizer.json").write_text("{}")  # beside it, as converters leave it
    assert engine_options("--model-path", str(path))["tokenizer_path"] == str(tmp_path)
