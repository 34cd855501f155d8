"""Flags of other servers."""

from __future__ import annotations

import pytest

from jqserve.cli import server
from jqserve.cli.foreign_flags import HINTS, hint


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
    ],
)
def test_the_error_says_what_to_do(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        server.parser().parse_args(flags.split())
    assert said in capsys.readouterr().err


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
