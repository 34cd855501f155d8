"""Flags of other servers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import jqserve
from jqserve.cli import server
from jqserve.cli.foreign_flags import HINTS, hint
from jqserve.cli.main import main


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tp-size 2", "--tp-size: a worker uses one GPU"),
        ("--max-model-len=4096", "--max-model-len: give --context-length"),
        ("--speculative-algorithm EAGLE", "no speculative decoding"),
        ("--trust-remote-code", "never run"),
        ("--ssl-keyfile key.pem", "give --tls-key"),
        ("--max-total-tokens 9", "give --num-pages"),
        ("--device cuda", "JAX chooses"),
        ("-tp 2", "-tp: a worker uses one GPU"),
        ("--swap-space 4", "--swap-space: weights and KV pages stay on the device"),
        ("--disable-log-requests", "off unless --log-requests is given"),
        ("org/model --port 1", "org/model: if it is the model, give --model-path org/model"),
    ],
)
def test_the_error_says_what_to_do(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        server.parser().parse_args(flags.split())
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) <= 4


def test_jqserve_plan_which_takes_the_same_flags_hints_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "x", "--max-model-len", "7"])
    assert "--max-model-len: give --context-length" in capsys.readouterr().err


def test_a_hint_names_no_flag_that_the_command_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--model-path", "x", "--max-model-len", "7"])
    assert "--context-length" not in capsys.readouterr().err


def test_the_server_as_a_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-path", "a b"]) == 2
    assert capsys.readouterr().err.endswith("of its own: jqserve-server --model-path 'a b'\n")


def test_the_package_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "jqserve", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"jqserve {jqserve.__version__}\n"


def test_the_servers_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        server.parser().parse_args(["--version"])
    assert capsys.readouterr().out == f"jqserve {jqserve.__version__}\n"


def test_a_typo_gets_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        server.parser().parse_args(["--contxt-length", "7"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --contxt-length 7\n")
    assert hint("--contxt-length") is None


def test_no_hint_is_for_a_flag_that_there_is_and_each_names_flags_that_there_are() -> None:
    known = {flag for action in server.parser()._actions for flag in action.option_strings}
    assert not known & set(HINTS)
    for what in HINTS.values():
        told = {word.strip(",;:") for word in what.split() if word.startswith("--")} - {"--workers"}
        assert told <= known, what
