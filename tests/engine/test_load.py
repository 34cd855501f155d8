"""What loading an engine says on the way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

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
