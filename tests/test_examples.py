"""The scripts in examples/ run as a reader would run them, on the model that ships with the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUNS = {
    "saliency.py": ([], "each token's part in that logit"),
    "inside_weights.py": ([], "bits a weight"),
    "generate_offline.py": (["--max-new-tokens", "4"], "tokens in"),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_example(name: str) -> None:
    options, expected = RUNS[name]
    done = run(name, *options)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize("name", RUNS)
def test_what_the_reader_got_wrong_is_one_line(name: str, tmp_path: Path) -> None:
    for path, says in ((tmp_path / "absent", "absent"), (tmp_path, "config.json")):
        done = run(name, "--model-path", str(path))
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("error: ") and says in line


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """With this checkout's jqserve, whichever is installed."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
