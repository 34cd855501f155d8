"""`jqserve logits` and the table of commands: files in and out, and every mistake one line and status 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jqserve.cli.logits import read_prompts
from jqserve.cli.main import COMMANDS, main
from jqserve.errors import RequestError


def run(demo_dir: Path, tmp_path: Path, arrays: dict[str, np.ndarray], *options: str) -> int:
    np.savez(tmp_path / "in.npz", **arrays)
    files = ["--input-ids", str(tmp_path / "in.npz"), "--out", str(tmp_path / "out")]
    return main(["logits", "--model-path", str(demo_dir), *files, *options])


def test_writes_logits_and_greedy_tokens_under_the_same_names(demo_dir: Path, tmp_path: Path) -> None:
    prompts = {"p0": np.array([5, 17, 33], np.int32), "p1": np.array([9], np.int64)}
    assert run(demo_dir, tmp_path, prompts, "--dtype", "float32", "--greedy", "2") == 0
    out = np.load(tmp_path / "out")  # the name as given, without .npz
    assert set(out.files) == {"p0", "p1", "p0_greedy", "p1_greedy"}
    assert out["p0"].shape == (3, 4096) and out["p1"].shape == (1, 4096) and out["p0"].dtype == np.float32
    assert out["p0_greedy"].shape == (2,) and out["p0_greedy"].dtype == np.int32
    assert out["p0_greedy"][0] == out["p0"][-1].argmax()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"p0": np.array([5, 4096])}, "p0 holds token id 4096; the model has 0..4095"),
        ({"p0": np.array([-1])}, "token id -1"),
        ({"p0": np.zeros(2049, int)}, "2049 + 0 positions; the model has 2048"),
        ({"p0": np.zeros((2, 2), int)}, "p0 must be int32 [S]"),
        ({"p0": np.zeros(0, int)}, "p0 must be int32 [S]"),
        ({"p0": np.zeros(3)}, "found float64 [3]"),
        ({"prompt": np.array([1])}, "unknown array 'prompt'"),
        ({}, "holds no arrays"),
    ],
)
def test_bad_prompts_are_named(
    demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arrays: dict, words: str
) -> None:
    assert run(demo_dir, tmp_path, arrays) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npz.npy", np.arange(3))
    (tmp_path / "pickled.npz").write_bytes(b"\x80\x04N.")
    for name in ("text.npz", "one.npz.npy", "pickled.npz"):
        with pytest.raises(RequestError, match="is not an"):
            read_prompts(tmp_path / name)


def test_prompts_come_in_numeric_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **{f"p{i}": np.array([i]) for i in (10, 2, 0)})
    assert list(read_prompts(tmp_path / "in.npz")) == ["p0", "p2", "p10"]


def test_usage_and_mistakes(capsys: pytest.CaptureFixture[str], demo_dir: Path, tmp_path: Path) -> None:
    assert main([]) == 0 and main(["--help"]) == 0 and main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert main(["lgits"]) == 2
    assert "unknown command 'lgits'" in capsys.readouterr().err
    assert run(demo_dir, tmp_path, {"p0": np.array([1])}, "--out", str(tmp_path / "no" / "where")) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert run(demo_dir, tmp_path, {"p0": np.array([1])}, "--out", str(tmp_path)) == 2
    assert "is a directory; give the file" in capsys.readouterr().err
    assert run(demo_dir, tmp_path, {"p0": np.array([1])}, "--greedy", "-1") == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0 and f"jqserve {name}" in capsys.readouterr().out
