from __future__ import annotations

import math
from typing import Any

import pytest

from jqserve.engine.config import EngineConfig, prefill_tiles
from jqserve.engine.defaults import sampling_defaults
from jqserve.engine.request import EngineRequest, SamplingParams
from jqserve.engine.sampler import MAX_COUNT
from jqserve.engine.validate import Limits, check_request, check_sampling, stop_ids
from jqserve.errors import RequestError, UnsupportedError

LIMITS = Limits(vocab_size=100, context_length=32, eos_token_ids=(2, 3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("min_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("seed", 2**64),
        ("seed", "7"),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logit_bias", ((100, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", tuple((i % 100, 1.0) for i in range(301))),
        ("stop_token_ids", (100,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", tuple(range(17))),
        ("stop", ("",)),
        ("stop", ("x",) * 33),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        check_sampling(SamplingParams(**{field: value}), LIMITS)
    assert caught.value.field == field and field in str(caught.value)


def test_min_above_max_is_refused() -> None:
    with pytest.raises(RequestError, match="more than max_new_tokens 3"):
        check_sampling(SamplingParams(min_new_tokens=4, max_new_tokens=3), LIMITS)


@pytest.mark.parametrize("ids", [(), (1, 100), (-1,), tuple(range(32))])
def test_prompts_that_cannot_be_served(ids: tuple[int, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        check_request(EngineRequest(0, ids, SamplingParams()), LIMITS)
    assert caught.value.field == "prompt"


def test_a_prompt_that_is_too_long_is_refused_and_not_cut() -> None:
    with pytest.raises(
        RequestError, match=r"it has 40 tokens; prompt and answer together may have 32.*--context-length"
    ):
        check_request(EngineRequest(0, (1,) * 40, SamplingParams()), LIMITS)


@pytest.mark.parametrize(("asked", "given"), [(None, 22), (5, 5), (22, 22), (1000, 22)])
def test_the_answer_ends_with_the_context(asked: int | None, given: int) -> None:
    request = check_request(EngineRequest(0, (1,) * 10, SamplingParams(max_new_tokens=asked)), LIMITS)
    assert request.sampling.max_new_tokens == given


@pytest.mark.parametrize("least", [3, 22, 23, 2**31])
def test_the_least_length_ends_with_the_context_too(least: int) -> None:
    """2**31 more than the prompt is no int32: the step failed, and with it every running request."""
    sampling = SamplingParams(min_new_tokens=least, max_new_tokens=2**31)
    request = check_request(EngineRequest(0, (1,) * 10, sampling), LIMITS)
    assert request.sampling.min_new_tokens == min(least, 22)


@pytest.mark.parametrize(("asked", "given"), [(0.0, 0.0), (1e-38, 0.0), (1e-7, 0.0), (1e-6, 1e-6), (0.7, 0.7)])
def test_a_temperature_that_logits_cannot_be_divided_by_is_greedy(asked: float, given: float) -> None:
    request = check_request(EngineRequest(0, (1,), SamplingParams(temperature=asked)), LIMITS)
    assert request.sampling.temperature == given


def test_stop_ids() -> None:
    assert stop_ids(SamplingParams(stop_token_ids=(7,)), LIMITS) == {2, 3, 7}
    assert stop_ids(SamplingParams(stop_token_ids=(7,), ignore_eos=True), LIMITS) == {7}


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        ({}, {}),
        ({"do_sample": True, "eos_token_id": 2, "max_length": 20}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"repetition_penalty": 1.05, "top_k": 20}, {"repetition_penalty": 1.05, "top_k": 20}),
        ({"temperature": 0.6, "do_sample": False}, {"temperature": 0.0}),
        ({"top_k": -1, "temperature": 1.0}, {}),
        ({"top_p": 7.0, "temperature": "hot", "min_p": 0.1}, {"min_p": 0.1}),
    ],
)
def test_sampling_defaults(generation_config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling_defaults(generation_config, LIMITS) == expected


def test_engine_config_from_the_link() -> None:
    config = EngineConfig.from_json({"model_path": "x", "context_length": None, "max_queued": 3})
    assert config == EngineConfig(model_path="x", max_queued=3)
    with pytest.raises(UnsupportedError, match="unknown engine options max_quued; known: activations, "):
        EngineConfig.from_json({"max_quued": 3})


@pytest.mark.parametrize(
    "bad",
    [
        {"load_format": "pt"},
        {"mem_fraction_static": 1.0},
        {"page_size": 0},
        {"page_size": "16"},
        {"num_pages": 1e3},
        {"max_queued": -1},
        {"chunked_prefill_size": 2**14 + 1},
        {"tile_size": 2**14 + 1},
    ],
)
def test_engine_options_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(bad))):
        EngineConfig(**bad)


@pytest.mark.parametrize(
    ("tokens", "tile", "tiles"), [(1, 128, 1), (128, 128, 1), (129, 128, 2), (2**14, 128, 128), (2**14, 100, 163)]
)
def test_no_step_has_more_tokens_than_the_penalties_can_count(tokens: int, tile: int, tiles: int) -> None:
    """One count below `sampler.MAX_COUNT`, and a whole step of that token more, is still an int16."""
    EngineConfig(chunked_prefill_size=tokens)
    assert prefill_tiles(tokens, tile) == tiles
    assert (MAX_COUNT - 1) + tiles * tile < 2**15
