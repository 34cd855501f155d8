"""The page stands alone, escapes what it is given, and its plots say what the numbers say; the verdict's arithmetic."""

from __future__ import annotations

import html
import html.parser
import itertools
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jqserve.cli.main import main
from jqserve.errors import JqserveError
from jqserve.evaluate import run
from jqserve.evaluate.page import page
from jqserve.evaluate.summary import as_json, rows
from jqserve.evaluate.svg import Axes, ticks
from jqserve.evaluate.verdict import FAILED, judge
from tests.checkpoint import tiny

NAME = "models/<script>alert(1)</script>"


def result(**changes: Any) -> dict[str, Any]:
    layer = {"own": 20.0, "accumulated": 18.0, "weights": {"q": 21.0, "down": 19.0}}
    found: dict[str, Any] = {
        "model": NAME,
        "base": "b",
        "scheme": "awq",
        "size": {"model": 4 << 20, "base": 11 << 20},
        "text": {
            "perplexity": 11.0,
            "base_perplexity": 10.0,
            "kl": 0.1,
            "top1_agreement": 0.9,
            "kl_by_position": [0.1] * 200,
        },
        "tasks": {
            "accuracy": 0.9,
            "base_accuracy": 0.95,
            "by_kind": {"add": [9, 10], "sub": [9, 10]},
            "base_by_kind": {"add": [10, 10], "sub": [9, 10]},
        },
        "layers": [{"index": 0, **layer}, {"index": 1, **layer, "own": 10.0}],
        "speed": {"model": 2000.0, "base": 1000.0},
        "made": {"jqserve": "0", "jax": "0", "device": "cpu", "date": "2026"},
        **changes,
    }
    verdict = judge(found, 0.98)
    found["verdict"] = {"passed": verdict.passed, "line": verdict.line()}
    return found


class Outside(html.parser.HTMLParser):
    """Everything that would be fetched, and every tag that is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "data")]
        self.scripts += tag == "script" and ("type", "application/json") not in attrs
        if tag not in ("meta", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_needs_nothing_else() -> None:
    text = page(result())
    parser = Outside()
    parser.feed(text)
    assert parser.fetched == [] and parser.scripts == 0
    assert not re.search(r"url\(|@import|https?://", text)
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    assert text.count("<svg") == 5
    data = re.search(r"id='result'>(.*?)</script>", text, re.S)
    assert data and json.loads(data[1]) == result()


def test_what_was_not_measured_is_not_shown() -> None:
    text = page(result(tasks=None, layers=None, speed=None, text=None, size={"model": 1, "base": None}))
    assert text.count("<svg") == 0 and "no verdict" in text


def test_rows() -> None:
    found = {name.strip(): (own, base) for name, own, base in rows(result())}
    assert found["perplexity"] == ("11.000", "10.000")
    assert found["task accuracy"] == ("90.0%", "95.0%")
    assert found["add"] == ("9 of 10", "10 of 10")
    assert found["worst layer, dB"][0] == "10.0 (layer 1)"
    assert found["tokens a second"] == ("2,000", "1,000")


def test_a_quantized_base_is_not_taken_for_an_unquantized_one(
    demo_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(3, 40))
    monkeypatch.setattr(run, "predict", lambda *_: None)
    monkeypatch.setattr(run, "_text", lambda *_: result()["text"])
    question = run.Question(str(demo_dir), str(demo_dir), tmp_path / "ids.npy", 1, 16, layers=False, speed=False)
    found = run.evaluate(question)
    (warning,) = found["warnings"]
    assert warning in caplog.text and "is quantized itself (gptq: uint4, groups of 128)" in warning
    assert html.escape(warning) in page(found) and rows(found)[0] == ("scheme", *["gptq: uint4, groups of 128"] * 2)
    config = SimpleNamespace(rope=SimpleNamespace(theta=1e4))
    dense: Any = SimpleNamespace(plan=SimpleNamespace(rows=[SimpleNamespace(spec=None)]), config=config)
    assert run._warnings(question, dense, None) == run._warnings(question, dense, dense) == []


def test_bars_are_as_high_as_their_values() -> None:
    axes = Axes((0, 1), (0, 1), "", "")
    axes.bar(0.5, 0.2, 0.5, "red", "x")
    height, whole = (float(re.search(r'height="([\d.]+)"', axes.svg(""))[1]), axes.at(0, 0)[1] - axes.at(0, 1)[1])  # type: ignore[index]
    assert height == pytest.approx(whole / 2, abs=0.1)


@pytest.mark.parametrize(("low", "high", "expected"), [(0, 1, 0.2), (0, 37, 10), (-3, 3, 2), (5, 5, 1)])
def test_ticks(low: float, high: float, expected: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(b - a == pytest.approx(expected) for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(("threshold", "status"), [("0.9", 0), ("0.95", FAILED)])
def test_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threshold: str, status: int
) -> None:
    def evaluate(question: run.Question, progress: Any) -> dict[str, Any]:
        found = result()
        verdict = judge(found, question.threshold)
        return {**found, "verdict": {"passed": verdict.passed, "line": verdict.line()}}

    monkeypatch.setattr(run, "evaluate", evaluate)
    assert main(["eval", "--model-path", "m", "--base", "b", "--text", "t", "--min-recovery", threshold]) == status
    assert capsys.readouterr().out.strip().endswith(f"threshold {float(threshold):.1%}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-recovery", "98"], "--min-recovery: is a share from 0 to 1 (0.98 for 98 %), found 98"),
        (["--html", "/no/such/place/r.html"], "--html: /no/such/place/r.html: its directory does not exist"),
        (["--json", "/no/such/place/r.json"], "--json: /no/such/place/r.json: its directory does not exist"),
        (["--html", "/tmp"], "--html: /tmp: is a directory"),
    ],
)
def test_what_cannot_end_well_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    monkeypatch.setattr(run, "evaluate", None)
    assert main(["eval", "--model-path", "m", "--text", "t", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_to_is_named_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "evaluate", None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever is root may write anywhere
    assert main(["eval", "--model-path", "m", "--text", "t", "--html", str(tmp_path / "r.html")]) == 2
    assert f"--html: {tmp_path / 'r.html'}: its directory cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"intermediate_size": 128}, "has ffn_size 128, the model 256: not its base"),
        ({"num_key_value_heads": 4}, "has kv_heads 4, the model 2: not its base"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}, "has heads 8, the model 4: not its"),
        ({"rope_theta": 500000.0}, ""),
    ],
)
def test_another_model_as_base(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    """Found before anything is measured; after it, shapes that do not fit were an internal error."""
    model, base = tiny.make(tmp_path / "model").path, tiny.make(tmp_path / "base", **other).path
    np.save(tmp_path / "ids.npy", np.arange(64))
    question = run.Question(str(model), str(base), tmp_path / "ids.npy", windows=1, seqlen=16)
    if words:
        with pytest.raises(JqserveError, match=f"^--base: {re.escape(str(base))} {words}"):
            run.evaluate(question)
        return
    assert run.evaluate(question)["warnings"] == [
        f"--base {base} has rope theta 500000, the model 10000: it is not its base, or one config.json is wrong"
    ]


def test_numbers_of_a_broken_model() -> None:
    """They fail it, also beside tasks that are right; JSON has no word for them."""
    text = {"perplexity": math.nan, "base_perplexity": 10.0, "kl": math.nan, "top1_agreement": 0.0}
    found = result(text={**text, "kl_by_position": [math.nan] * 9})
    assert judge(found, 0.5).recovery == 0.0 and not judge(found, 0.5).passed
    assert json.loads(as_json(found))["text"]["perplexity"] is None
    assert "nan" not in page(found).replace(">nan<", "") and page(found).count("<svg") == 3


def test_a_base_that_solves_nothing_passes_nothing() -> None:
    verdict = judge(result(text=None, tasks={"accuracy": 0.0, "base_accuracy": 0.0, "by_kind": {}}), 0.98)
    assert verdict.status == FAILED and "the base solves none of the tasks" in verdict.line()


def test_size_on_disk(tmp_path: Path) -> None:
    for name, size in (("hf/a.safetensors", 3), ("hf/x.json", 9), ("gguf/m.gguf", 5), ("store/jqserve.json", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "store" / "params").mkdir()
    (tmp_path / "store" / "params" / "data").write_bytes(b"x" * 20)
    found = [run._bytes(str(tmp_path / name)) for name in ("hf", "gguf/m.gguf", "gguf", "store")]
    assert found == [3, 5, 5, 22]


def test_the_verdict() -> None:
    verdict = judge(result(), 0.9)
    assert verdict.parts == {"tasks": pytest.approx(0.9 / 0.95), "perplexity": pytest.approx(10 / 11)}
    assert verdict.recovery == pytest.approx(10 / 11) and verdict.passed and verdict.status == 0
    assert verdict.line().startswith("PASS: recovery 90.9% (tasks 94.7%, perplexity 90.9%)")
    assert judge(result(), 0.95).status == FAILED
    alone = judge(result(tasks=None, text={"perplexity": 3.0, "base_perplexity": None}), 0.98)
    assert alone.passed and "nothing to compare" in alone.line()
