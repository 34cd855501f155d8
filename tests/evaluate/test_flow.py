"""The README's flow on the base fixture: quantize, eval, serve, each as a user types it. (Downloading is the Hub's.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jqserve.client import Client
from tests.e2e.server_process import server_process


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "jqserve.cli.main", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute and a half of two cores: three commands that compile, and a server
def test_quantize_eval_serve(fixtures_dir: Path, tmp_path: Path) -> None:
    base, out = fixtures_dir / "base-bf16", tmp_path / "quantized"
    made = command("quantize", "--model-path", base, "--out", out, "--scheme", "w4a16", "--group-size", "64")
    assert made.returncode == 0, made.stderr
    assert "layer 5: signal to error in dB: q " in made.stdout and "42 Linears quantized" in made.stdout
    page, result = tmp_path / "report.html", tmp_path / "report.json"
    outputs = ("--json", result, "--html", page)
    tasks = ("--tasks", fixtures_dir / "tasks_test.jsonl", "--limit", "24")
    text = ("--text", fixtures_dir / "valid.bin", "--windows", "2", "--seqlen", "128")
    compared = ("eval", "--model-path", out, "--base", base, *text)
    judged = command(*compared, *tasks, *outputs, "--min-recovery", "0.8")
    assert judged.returncode == 0, judged.stderr
    found = json.loads(result.read_text())
    # RTN on this base: perplexity 27.28 of 25.76 over 64 windows, tasks 93.6 % of 94.5 % (shared/fixtures/README.md)
    assert 1.0 < found["text"]["perplexity"] / found["text"]["base_perplexity"] < 1.2
    assert found["tasks"]["accuracy"] > 0.8 and len(found["layers"]) == 6
    assert judged.stdout.strip().splitlines()[-1] == found["verdict"]["line"]
    assert page.read_text().count("<svg") == 5
    flags = ("--context-length", "128", "--max-running-requests", "2", "--disable-warmup")
    chat = [{"role": "user", "content": "What is 463 + 88?"}]
    with server_process(out, *flags) as server, Client(server.target) as client:
        assert client.generate(chat, max_new_tokens=16, temperature=0.0).wait().text.strip() == "551"


def test_errors_are_one_line(fixtures_dir: Path, tmp_path: Path) -> None:
    base = fixtures_dir / "base-bf16"
    done = command("quantize", "--model-path", base, "--out", tmp_path / "x", "--scheme", "gptq")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("jqserve quantize: error: --calibration: --scheme gptq needs calibration data")
    done = command("eval", "--model-path", base)
    assert done.returncode == 2 and "nothing to measure" in done.stderr
