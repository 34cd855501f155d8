"""lm-evaluation-harness runs locally defined tasks of all three kinds through the adapter, and its numbers are ours.

Needs an interpreter with lm_eval: JQSERVE_LM_EVAL_PYTHON, or this one when it has `pip install jqserve[eval]`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jqserve
from jqserve.server.tokenizer import load_tokenizer

pytestmark = pytest.mark.peers
ROOT = Path(__file__).resolve().parents[2]


def log_p(model: jqserve.Model, params: dict, ids: list[int]) -> np.ndarray:
    """log p of ids[1:], each given those before it."""
    logits = np.asarray(model(params, np.array(ids)), np.float64)[:-1]
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.slow
def test_local_tasks(fixtures_dir: Path, tmp_path: Path) -> None:
    python = os.environ.get("JQSERVE_LM_EVAL_PYTHON")
    if python is None and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install 'jqserve[eval]', or set JQSERVE_LM_EVAL_PYTHON")
    base = fixtures_dir / "base-bf16"
    ask = "<|bos|><|user|>What is {} + {}?<|end|><|assistant|>"
    sums = [(463, 88), (120, 45), (7, 9), (310, 222)]
    rows = [{"prompt": ask.format(a, b), "answer": str(a + b)} for a, b in sums]
    wrong = [{"prompt": row["prompt"], "right": row["answer"], "wrong": str(int(row["answer"]) + 8)} for row in rows]
    text = "The configuration file lists every option with its default value. " * 12  # longer than 64 tokens
    for name, documents in (("generate", rows), ("choice", wrong), ("rolling", [{"text": text}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    line = [python or sys.executable, str(Path(__file__).parent / "harness_run.py"), str(base), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*line, str(tmp_path / "out.json")], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["results"]["local_generate"]["exact_match,none"] == 1.0
    assert found["results"]["local_choice"]["acc,none"] == 1.0

    model, params = jqserve.load(base, dtype="float32")
    tokenizer = load_tokenizer(str(base))
    assert len(found["choice"]) == 2 * len(wrong)
    for context, continuation, score in found["choice"]:
        before, after = (tokenizer.encode(x, add_special_tokens=False) for x in (context, continuation))
        expected = log_p(model, params, [*before, *after])[-len(after) :].sum()
        assert score == pytest.approx(expected, abs=2e-3, rel=1e-4), (context, continuation)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 128
    expected = log_p(model, params, [1, *ids[:64]]).sum()  # bos, then windows of 64 that end where the last one began
    for begin in range(64, len(ids), 64):
        end = min(begin + 64, len(ids))
        expected += log_p(model, params, ids[end - 65 : end])[begin - end :].sum()
    assert found["rolling"][0] == pytest.approx(expected, abs=2e-2)

    direct = found["direct"]
    alone = log_p(model, params, [1, *tokenizer.encode(" The file", add_special_tokens=False)]).sum()
    assert [score for score, _ in direct["empty"]] == pytest.approx([alone, alone, 0.0], abs=2e-3)
    assert direct["stopped"] == ["5", "551"]
    assert direct["asked"] == "<|bos|><|user|>hi<|end|><|assistant|>"
    assert direct["begun"] == direct["asked"] + "So "  # lm_eval gives the beginning of an answer so: no end of turn
