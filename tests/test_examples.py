"""The scripts in examples/ run as a reader would run them, on the model that ships with the package."""

from __future__ import annotations

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
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
