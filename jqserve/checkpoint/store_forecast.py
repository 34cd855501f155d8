"""`forecast` of a directory that `jqserve convert` wrote: from its manifest, without Orbax and without jax."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from jqserve.checkpoint.asked import Answer, Stored, answer, check_something_fits
from jqserve.checkpoint.forecast import Forecast, dense_row, quantized_row
from jqserve.checkpoint.loaded import Activations
from jqserve.checkpoint.manifest import LeafFacts
from jqserve.checkpoint.opening import HEAD_STAYS, SAFETENSORS_DTYPE, check_dtype
from jqserve.checkpoint.plan import PlanRow, joined_notes
from jqserve.checkpoint.quant_config import NOT_QUANTIZED
from jqserve.checkpoint.store_check import described
from jqserve.models.config import ModelConfig
from jqserve.quant import NO_ACTIVATION

KV_SCALES = (".k_scale", ".v_scale")


def forecast_store(
    path: Path, dtype: str | None, activations: Activations, quantization: str | None
) -> tuple[ModelConfig, Forecast]:
    """The config with its dtype resolved, and what `store.restore` would make of the same arguments. Raises as it does,
    for all that the manifest shows."""
    config, _, plan, sections = described(path)
    dtype = config.dtype if dtype in (None, "auto") else str(dtype)
    check_dtype(dtype)
    leaves = {name: facts for section in sections.values() for name, facts in section.items()}
    linears = (Stored(facts.spec, plan.method) for facts in leaves.values())
    asked = answer(quantization, plan.method, linears, path)
    check_something_fits(asked.online, plan.dense_linears, path)
    rows = tuple(_row(row, leaves[f"{row.path}.weight"], dtype, activations, asked) for row in plan.rows)
    matrices = {f"{row.path}.weight" for row in rows}
    scaled = any(name.endswith(KV_SCALES) for name in leaves) and activations == "config"
    vectors = [facts for name, facts in leaves.items() if name not in matrices and not name.endswith(KV_SCALES)]
    nbytes = sum(math.prod(facts.arrays[""].shape) for facts in vectors) * np.dtype(dtype).itemsize
    sizes = sorted(_bytes(facts) for facts in leaves.values())
    tied = config.tied_embeddings
    whole = all(row.spec is None for row in rows)
    reasons = {row.source: _reason(row, whole, asked, tied) for row in rows if row.spec is None}
    notes = (asked.note, *plan.notes) if asked.note else plan.notes
    plan = dataclasses.replace(plan, method=asked.method(plan.method), rows=rows, notes=notes)
    found = Forecast(plan, nbytes, sum(sizes[-2:]), reasons, scaled)
    return dataclasses.replace(config, dtype=dtype), found


def _row(row: PlanRow, facts: LeafFacts, dtype: str, activations: Activations, asked: Answer) -> PlanRow:
    method, spec = row.scheme.partition(":")[0], facts.spec
    if spec is None:
        online = asked.online if row.path.startswith("layers.") else None
        if online is not None and activations == "none":
            online = dataclasses.replace(online, activation=NO_ACTIVATION)
        new = None if online is None else online.spec(*row.shape)
        if online is None or new is None:
            note = joined_notes(row.note, online.misfit(*row.shape) if online else "")
            return dense_row(row.path, row.source, row.shape, dtype, note)
        words = {name: word for word, name in SAFETENSORS_DTYPE.items()}
        scale = online.scale_dtype({"weight": words.get(facts.arrays[""].dtype, "F32")})
        return quantized_row(row.path, row.source, "online", new, scale, False, row.note)
    if activations == "none":
        spec = spec.replace(activation=NO_ACTIVATION)
    elif asked.activation is not None:
        spec = spec.replace(activation=asked.activation)
    ordered = "perm" in facts.arrays
    return quantized_row(row.path, row.source, method, spec, facts.arrays["scale"].dtype, ordered, row.note)


def _reason(row: PlanRow, whole: bool, asked: Answer, tied: bool) -> str:
    """whole: nothing of the model is quantized."""
    if row.path == "embed":
        return f"the embedding is looked up{' and serves as head' if tied else ''}"
    if asked.online is not None:
        return HEAD_STAYS if row.path == "lm_head" else asked.online.misfit(*row.shape)
    return NOT_QUANTIZED if whole else "`jqserve convert` found it unquantized"


def _bytes(facts: LeafFacts) -> int:
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in facts.arrays.values())
