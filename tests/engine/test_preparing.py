"""What the first constrained or scored request waits for, and that the log says so."""

from __future__ import annotations

import concurrent.futures
import logging

import pytest

from jqserve.engine.config import EngineConfig
from jqserve.engine.preparing import Preparing
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.sequence import Sequence
from jqserve.errors import UnsupportedError


def scored(rid: int) -> Sequence:
    request = EngineRequest(rid, (5, 6, 7), SamplingParams(prompt_logprobs=0, seed=1))
    return Sequence(request, 0, 8, [5, 6, 7], frozenset(), scores={})


def test_the_log_says_once_why_the_first_one_waits_and_what_would_spare_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    programs: concurrent.futures.Future[None] = concurrent.futures.Future()
    preparing = Preparing(None, lambda: programs)
    for rid in (1, 2):
        preparing.add(scored(rid))
    assert list(preparing.ready()) == [] and len(preparing) == 2
    (told,) = caplog.records
    assert "--constraint-warmup" in told.getMessage() and told.levelno == logging.WARNING
    programs.set_result(None)
    assert [sequence.rid for sequence in preparing.ready() if isinstance(sequence, Sequence)] == [1, 2]
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


def test_nobody_is_told_when_nobody_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    programs: concurrent.futures.Future[None] = concurrent.futures.Future()
    programs.set_result(None)  # --constraint-warmup
    preparing = Preparing(None, lambda: programs)
    preparing.add(scored(1))
    assert len(list(preparing.ready())) == 1 and not caplog.records


def test_a_warm_up_cannot_be_had_without_the_warm_up() -> None:
    with pytest.raises(UnsupportedError, match="leave out --disable-warmup"):
        EngineConfig(disable_warmup=True, constraint_warmup=True)
