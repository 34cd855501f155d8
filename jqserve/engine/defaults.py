"""A checkpoint's sampling defaults, from generation_config.json, under our names. Plain Python."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from jqserve.engine.request import SamplingParams
from jqserve.engine.validate import Limits, check_sampling
from jqserve.errors import RequestError

log = logging.getLogger(__name__)

#: generation_config.json -> SamplingParams; what else it may hold (max_length, num_beams, ...) is not about sampling
#: one continuation and is left alone.
NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
}


def sampling_defaults(generation_config: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The fields of SamplingParams that differ from our defaults: what a request gets where it says nothing.

    `do_sample` false, written out, means greedy. Absent, it means nothing: servers sample by default, as vLLM and
    SGLang do with the same files. A value out of range is left out, and logged.
    """
    found: dict[str, Any] = {}
    one: dict[str, Any]
    for name, ours in NAMES.items():
        value = generation_config.get(name)
        if value is None:
            continue
        if ours == "top_k" and value == -1:
            value = 0
        try:
            one = {ours: value}
            check_sampling(SamplingParams(**one), limits)
        except RequestError as error:
            log.warning("generation_config.json: %s is ignored: %s", name, error)
            continue
        found[ours] = value
    if generation_config.get("do_sample") is False:
        found["temperature"] = 0.0
    usual = SamplingParams()
    return {name: value for name, value in found.items() if value != getattr(usual, name)}
