"""`jqserve plan ORG/NAME`: only the headers of the weights cross the network, and nothing that is in the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.checkpoint.fake_hub import COMMIT, MODEL, FakeHub

FIRST_REQUEST = 100_001  # bytes that huggingface_hub asks for, in the hope that the header ends there


def environment(url: str, home: Path) -> dict[str, str]:
    found = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return found | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def plan(url: str, home: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, what it printed, what it told) of a process: huggingface_hub reads its environment once."""
    command = [sys.executable, "-m", "jqserve.cli.main", "plan", *words, "--json"]
    done = subprocess.run(command, env=environment(url, home), capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_only_headers_are_fetched(tmp_path: Path, demo_dir: Path) -> None:
    with FakeHub(demo_dir).running() as hub:
        status, there, told = plan(hub.url, tmp_path, MODEL)
        assert status == 0, told
        weights = hub.sent["model.safetensors"]
        size = (demo_dir / "model.safetensors").stat().st_size
        assert weights <= FIRST_REQUEST < size / 10
        assert not list(tmp_path.rglob("*.safetensors")), "nothing of the weights is kept"
        status, here, told = plan(hub.url, tmp_path, str(demo_dir))
        assert status == 0 and there == here
        snapshot = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots" / COMMIT
        shutil.copy(demo_dir / "model.safetensors", snapshot)
        assert plan(hub.url, tmp_path, MODEL) == (0, here, told)
        assert hub.sent["model.safetensors"] == weights, "it is in the cache now"
        status, _, told = plan(hub.url, tmp_path / "new", MODEL, "--quantization", "fp8")
        assert status == 2 and f"`jqserve-server --model-path {MODEL}`" in told, "not a folder that is gone"


def test_what_is_missing_is_said(tmp_path: Path, demo_dir: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(demo_dir / "config.json", bare)
    with FakeHub(bare).running() as hub:
        status, _, told = plan(hub.url, tmp_path / "home", MODEL)
        assert status == 2 and f"{MODEL}: has no safetensors that can be read" in told
        status, found, told = plan(hub.url, tmp_path / "home", MODEL, "--load-format", "dummy")
        assert status == 0, told
        assert found["method"] == "gptq" and any("--load-format dummy" in warning for warning in found["warnings"])
    status, _, told = plan(hub.url, tmp_path / "home", MODEL)  # nobody listens there any more
    assert status == 2 and told.count("\n") == 1 and "Traceback" not in told


def test_a_repository_of_gguf_files_is_told_how_to_take_one(tmp_path: Path) -> None:
    """By a plan and by what loads it, with configuration beside the files and without."""
    for name, more in (("bare", []), ("configured", ["config.json"])):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("m-Q2_K.gguf", "m-Q4_K_M.gguf", "README.md", *more):
            (folder / file).write_text("{}")
        with FakeHub(folder).running() as hub:
            status, _, told = plan(hub.url, tmp_path / f"home-{name}", MODEL)
            assert status == 2 and "Traceback" not in told
            assert f"{MODEL}: holds GGUF files (m-Q2_K.gguf, m-Q4_K_M.gguf) and no safetensors" in told
            assert f"`hf download {MODEL} m-Q4_K_M.gguf --local-dir DIR`, then --model-path DIR/m-Q4_K_M.gguf" in told
            code = f"from jqserve.checkpoint.hub import resolve; resolve({MODEL!r})"
            done = subprocess.run(
                [sys.executable, "-c", code],
                env=environment(hub.url, tmp_path / f"home-{name}"),
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert "holds GGUF files (m-Q2_K.gguf" in done.stderr
            assert not any(name.endswith(".gguf") for name in hub.sent)
