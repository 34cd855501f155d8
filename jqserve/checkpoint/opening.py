"""What a checkpoint is, from its configs and headers alone: read, compared, nothing loaded yet."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, get_args

import numpy as np

from jqserve.checkpoint.asked import OVERRIDES, Answer, Stored, answer, check_something_fits
from jqserve.checkpoint.audit import Audit, audit
from jqserve.checkpoint.gguf_checkpoint import GgufCheckpoint
from jqserve.checkpoint.loaded import Activations
from jqserve.checkpoint.model_config import DTYPES, model_config
from jqserve.checkpoint.names import LinearGroup, modules
from jqserve.checkpoint.online import Online
from jqserve.checkpoint.open import AnyCheckpoint
from jqserve.checkpoint.plan import LoadPlan, PlanRow
from jqserve.checkpoint.quant_config import QuantPlan, quant_plan
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.scheme import Scheme
from jqserve.errors import UnsupportedError
from jqserve.models.config import ModelConfig

log = logging.getLogger(__name__)
HEAD_STAYS = "the head is never quantized while loading"
KV_MISSING = (
    "config.json has a kv_cache_scheme, but no file has k_scale and v_scale: the KV cache is not quantized "
    "(--kv-cache-dtype fp8_e4m3 does so with scale 1.0)"
)
SAFETENSORS_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A checkpoint whose configs and headers have been read and agree; nothing is loaded yet."""

    checkpoint: AnyCheckpoint
    config: ModelConfig
    generation_config: dict[str, Any]
    method: str
    note: str
    audited: Audit
    kv_missing: bool = False  # the config promises scales for an fp8 KV cache, the files have none

    def plan(self, rows: list[PlanRow]) -> LoadPlan:
        """The plan, once all rows are known."""
        notes = [self.note] if self.note else []
        if unread := self.checkpoint.unread:
            notes.append(f"not read, no part of the model by its index: {', '.join(unread[:5])}")
        if self.audited.kv is not None:
            notes.append(self.audited.kv.note())
        if self.kv_missing:
            notes.append(KV_MISSING)
        reasons = dict.fromkeys(extra.reason for extra in self.audited.extras)
        notes += [f"left out: {sum(e.reason == r for e in self.audited.extras)} x {r}" for r in reasons]
        return LoadPlan(self.method, tuple(rows), tuple(notes))


def open_model(
    checkpoint: AnyCheckpoint, dtype: str | None, activations: Activations, quantization: str | None
) -> OpenModel:
    """Reads the configs and compares them with the headers. Raises as `load` does."""
    config, generation, plan, note = read_plan(checkpoint, dtype, activations, quantization)
    note = "; ".join(filter(None, (checkpoint.note, note)))
    audited = audit(checkpoint, config, plan, kv=activations == "config")
    missing = plan.kv_promised and audited.kv is None
    return OpenModel(checkpoint, config, generation, plan.method, note, audited, missing)


def read_plan(
    checkpoint: AnyCheckpoint, dtype: str | None, activations: Activations, quantization: str | None
) -> tuple[ModelConfig, dict[str, Any], Asked, str]:
    """(config, generation_config, the plan with what the user's flags change, a note on them), from configs alone."""
    check_activations(activations)
    config, generation = read_configs(checkpoint, dtype)
    stored = quant_plan(checkpoint, own_inputs=quantization in OVERRIDES)
    groups = [module for module in modules(config) if isinstance(module, LinearGroup)]
    slots = [slot for group in groups for _, slot in group.parts]
    linears = (Stored.of(stored.scheme(slot.name), slot.n, slot.k) for slot in slots)
    asked = answer(quantization, stored.method, linears, checkpoint.path)
    plan = Asked(stored, asked, activations == "none")
    taken = ((slot.name, slot.n, slot.k) for slot in slots if isinstance(plan.scheme(slot.name), Online))
    check_something_fits(asked.online, taken, checkpoint.path)
    if asked.note and not asked.alias:
        log.info("%s", asked.note)
    return config, generation, plan, asked.note


def read_configs(checkpoint: AnyCheckpoint, dtype: str | None) -> tuple[ModelConfig, dict[str, Any]]:
    """(model config with its dtype resolved, generation_config.json or {}). dtype: None or "auto", or one of DTYPES."""
    generation = checkpoint.optional_json("generation_config.json") or {}
    where = checkpoint.path if isinstance(checkpoint, GgufCheckpoint) else checkpoint.path / "config.json"
    config = model_config(checkpoint.config, generation, str(where))
    if dtype is None or dtype == "auto":
        embedding = "model.embed_tokens.weight"
        stored = SAFETENSORS_DTYPE.get(checkpoint.dtype(embedding), "") if embedding in checkpoint else ""
        dtype = config.dtype or stored or "bfloat16"
    check_dtype(dtype)
    return dataclasses.replace(config, dtype=dtype), generation


def dtype_name(dtype: Any) -> Any:
    """ "float32" for jnp.float32 and np.dtype("float32"), which callers from Python have at hand; text and None as they
    are, and what is no dtype, for `check_dtype` to refuse."""
    try:
        return dtype if dtype is None or isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        return dtype


def check_dtype(dtype: str) -> None:
    """Raises UnsupportedError for a --dtype that does not exist."""
    if dtype not in DTYPES:
        raise UnsupportedError(f"--dtype {dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")


def check_activations(activations: str) -> None:
    """Raises UnsupportedError for an --activations that does not exist."""
    if activations not in get_args(Activations):
        raise UnsupportedError(f"--activations {activations!r} is not supported; supported: config, none")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A checkpoint's plan as the user's flags change it. The head is never quantized online."""

    plan: QuantPlan
    asked: Answer
    without_activations: bool

    @property
    def method(self) -> str:
        return self.asked.method(self.plan.method)

    def scheme(self, module: str) -> Scheme:
        scheme = self.plan.scheme(module)
        if self.asked.online is not None and scheme == DENSE and module != "lm_head":
            scheme = self.asked.online
        if self.asked.activation is not None:
            scheme = scheme.with_activation(self.asked.activation)
        return scheme.without_activation() if self.without_activations else scheme

    def why_dense(self, module: str) -> str:
        why = self.plan.why_dense(module)
        if not why or self.asked.online is None:
            return why
        return HEAD_STAYS if module == "lm_head" else ""

    @property
    def kv_promised(self) -> bool:
        """Whether the config says that there are scales for an fp8 KV cache."""
        return bool(getattr(self.plan, "kv_cache_scheme", False)) and not self.without_activations
