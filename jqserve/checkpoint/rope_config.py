"""Rotary embedding parameters, from transformers 5's `rope_parameters` or 4's `rope_theta` and `rope_scaling`."""

from __future__ import annotations

from jqserve.checkpoint.fields import Fields
from jqserve.models.config import RopeConfig

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
#: yarn's own numbers, with transformers' defaults; None = derived.
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def rope_config(config: Fields, max_position: int) -> RopeConfig:
    """Reads both dialects: a reader of one alone would take 10000 as theta, or drop a scaling, in silence."""
    parameters = config.child("rope_parameters")
    scaling = config.child("rope_scaling")
    if parameters is not None and any(isinstance(v, dict) for v in parameters.data.values()):
        raise config.unsupported("rope_parameters", "one set of parameters for all layers")
    if parameters is not None and scaling is not None and _scaling(parameters) != _scaling(scaling):
        # transformers would take the scaling, and 10000 as theta unless that stands in it or at the top
        raise config.error("rope_scaling", "none beside rope_parameters that say something else: put it into them")
    source = parameters or scaling
    for fields in (config, source or config):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.unsupported("partial_rotary_factor", "1.0 (the whole head is rotated)")
    theta = config.number("rope_theta", 10000.0)
    if source is None:
        return RopeConfig(
            theta=_positive(config, "rope_theta", theta), kind="default", original_max_position=max_position
        )
    theta = _positive(source, "rope_theta", source.number("rope_theta", theta))
    key = "rope_type" if source.data.get("rope_type") is not None else "type"
    kind = source.one_of(key, KINDS, "default")
    original = source.integer("original_max_position_embeddings", max_position)
    if kind == "default":
        return RopeConfig(theta=theta, kind=kind, original_max_position=original)
    factor = source.number("factor")
    if factor < 1.0:
        raise source.error("factor", "a number of at least 1")
    if kind == "llama3":
        low, high = source.number("low_freq_factor"), source.number("high_freq_factor")
        source.integer("original_max_position_embeddings")  # llama3 cannot do without
        if not 0 < low < high:
            raise source.error("low_freq_factor", f"a number above 0 and below high_freq_factor {high}")
        return RopeConfig(theta, kind, factor, low, high, original)
    extra: tuple[tuple[str, float], ...] = ()
    if kind == "yarn":
        extra = tuple((k, source.number(k)) for k in _YARN if source.data.get(k) is not None)
        for key, value in extra:
            if value <= 0:
                raise source.error(key, "a positive number")
        if theta <= 1.0:  # the logarithm of theta is divided by
            raise source.error("rope_theta", "a number above 1 with yarn")
        if source.data.get("truncate") is not None:
            extra += (("truncate", float(source.flag("truncate"))),)
    return RopeConfig(theta=theta, kind=kind, factor=factor, original_max_position=original, extra=extra)


def _scaling(fields: Fields) -> dict[str, object]:
    """All but theta, in one dialect, to compare."""
    facts = {k: v for k, v in fields.data.items() if v is not None and k not in ("rope_theta", "type", "rope_type")}
    return facts | {"kind": fields.data.get("rope_type") or fields.data.get("type") or "default"}


def _positive(source: Fields, key: str, theta: float) -> float:
    if theta <= 0:
        raise source.error(key, "a positive number")
    return theta
