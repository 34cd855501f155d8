"""The checked-in code is what the .proto generates, and both processes' sides stay light."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate(tmp_path)
    for name in module.NAMES:
        assert (tmp_path / name).read_text() == (module.PACKAGE / name).read_text(), "run python protos/generate.py"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("jqserve.client", "jax flax transformers torch numpy"),
        ("jqserve.cli.server", "jax flax torch"),
        ("jqserve.server.app", "jax flax torch"),
        ("jqserve.engine.wire", "jax flax numpy grpc"),
    ],
)
def test_what_importing_does_not_bring(module: str, absent: str) -> None:
    code = f"import {module}, sys; print([m for m in {absent.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"
