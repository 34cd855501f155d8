"""What a checkpoint is, from its configs and headers alone: read, compared, nothing loaded yet."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from jqserve.checkpoint.audit import Audit, audit
from jqserve.checkpoint.extras import verify
from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.loaded import Activations, Place, keep_on_host
from jqserve.checkpoint.model_config import DTYPES, model_config
from jqserve.checkpoint.online import online_scheme
from jqserve.checkpoint.plan import LoadPlan, PlanRow
from jqserve.checkpoint.quant_config import QuantPlan, quant_plan
from jqserve.checkpoint.scheme import Scheme
from jqserve.checkpoint.stream import Stream
from jqserve.errors import UnsupportedError
from jqserve.models.config import ModelConfig

SAFETENSORS_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
Decode = Literal["auto", "host", "device"]


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A checkpoint whose configs and headers have been read and agree; nothing is loaded yet."""

    checkpoint: Checkpoint
    config: ModelConfig
    generation_config: dict[str, Any]
    method: str
    quantization: str | None
    activations: Activations
    audited: Audit

    def stream(self, device_put: Place | None, decode: Decode) -> Stream:
        """The modules, built one by one. Reads the extras whose values must be looked at first."""
        verify(self.checkpoint, self.audited.extras)
        if decode == "auto":
            decode = "host" if device_put is keep_on_host or jax.default_backend() == "cpu" else "device"
        return Stream(
            self.checkpoint,
            self.audited,
            dtype=self.config.dtype,
            online=online_scheme(self.quantization, self.method, self.activations),
            place=device_put or jax.device_put,
            on_device=decode == "device",
        )

    def plan(self, rows: list[PlanRow]) -> LoadPlan:
        """The plan, once all rows are known."""
        notes = [f"quantized while loading: --quantization {self.quantization}"] if self.quantization else []
        reasons = dict.fromkeys(extra.reason for extra in self.audited.extras)
        if unread := self.checkpoint.unread:
            notes.append(f"not read, no part of the model by its index: {', '.join(unread[:5])}")
        notes += [f"left out: {sum(e.reason == r for e in self.audited.extras)} x {r}" for r in reasons]
        return LoadPlan(self.method, tuple(rows), tuple(notes))


def open_model(
    checkpoint: Checkpoint, dtype: str | None, activations: Activations, quantization: str | None
) -> OpenModel:
    """Reads the configs and compares them with the headers. Raises as `load` does."""
    config, generation = read_configs(checkpoint, dtype)
    plan: QuantPlan = quant_plan(checkpoint)
    quantization = None if quantization == "none" else quantization
    online_scheme(quantization, plan.method, activations)
    if activations == "none":
        plan = WithoutActivations(plan)
    audited = audit(checkpoint, config, plan)
    return OpenModel(checkpoint, config, generation, plan.method, quantization, activations, audited)


def read_configs(checkpoint: Checkpoint, dtype: str | None) -> tuple[ModelConfig, dict[str, Any]]:
    """(model config with its dtype resolved, generation_config.json or {}). dtype: None or "auto", or one of DTYPES."""
    generation = checkpoint.optional_json("generation_config.json") or {}
    config = model_config(checkpoint.config, generation, str(checkpoint.path / "config.json"))
    if dtype is None or dtype == "auto":
        embedding = "model.embed_tokens.weight"
        stored = SAFETENSORS_DTYPE.get(checkpoint.dtype(embedding), "") if embedding in checkpoint else ""
        dtype = config.dtype or stored or "bfloat16"
    check_dtype(dtype)
    return dataclasses.replace(config, dtype=dtype), generation


def check_dtype(dtype: str) -> None:
    """Raises UnsupportedError for a --dtype that does not exist."""
    if dtype not in DTYPES:
        raise UnsupportedError(f"--dtype {dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")


@dataclasses.dataclass(frozen=True)
class WithoutActivations:
    """A plan whose schemes leave the input of every matmul as it is."""

    plan: QuantPlan

    @property
    def method(self) -> str:
        return self.plan.method

    def scheme(self, module: str) -> Scheme:
        return self.plan.scheme(module).without_activation()
