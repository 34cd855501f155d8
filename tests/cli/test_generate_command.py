"""`jqserve generate` on the model that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jqserve.cli.generate import read_prompts
from jqserve.cli.main import main
from jqserve.engine import api
from jqserve.errors import RequestError


def test_completes_prompts_in_order(demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "To install"}\n\n{"prompt": "def main():"}\n')
    command = ["generate", "--model-path", str(demo_dir), "--prompts-file", str(tmp_path / "p.jsonl")]
    command += ["--prompt", "First", "--max-new-tokens", "3", "--temperature", "0", "--json"]
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["First", "To install", "def main():"]
    assert all(0 < row["tokens"] <= 3 for row in rows)


def test_mistakes_are_named(demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model-path", str(demo_dir)]) == 2
    assert "no prompt" in capsys.readouterr().err
    command = ["generate", "--model-path", str(demo_dir), "--prompts-file", str(tmp_path / "absent.txt")]
    assert main(command) == 2
    assert f"--prompts-file: {tmp_path / 'absent.txt'}: No such file" in capsys.readouterr().err
    for text, words in (("{", "line 1 is not JSON"), ('{"prompt": 3}', "line 1 must be an object")):
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(RequestError, match=words):
            read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--temperature", "nan"], "temperature: nan is not a finite number"),
        (["--max-new-tokens", "0"], "max_new_tokens: 0 is less than 1"),
        (["--stop", ""], "stop: a stop string is empty"),
        (["--top-p", "0"], "top_p: 0.0 is not in (0, 1]"),
        (["--top-k", "-5"], "top_k: -5 is not in -1"),
        (["--prompt", "b", "--seed", str(2**64 - 1)], "seed: 18446744073709551616 is not in"),
    ],
)
def test_what_cannot_be_sampled_so_is_refused_before_anything_loads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], says: str
) -> None:
    monkeypatch.setattr(api, "Engine", None)
    assert main(["generate", "--model-path", "/large", "--prompt", "a", *flags]) == 2
    assert says in capsys.readouterr().err
