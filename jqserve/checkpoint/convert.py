"""`load`: a checkpoint directory, of Hugging Face's form or our own, becomes the canonical parameter tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax

from jqserve.checkpoint.forecast import Foretell, forecast
from jqserve.checkpoint.loaded import Activations, LoadedCheckpoint, Place, Progress, keep_on_host, set_path
from jqserve.checkpoint.open import AnyCheckpoint, is_store, open_checkpoint
from jqserve.checkpoint.opening import open_model
from jqserve.checkpoint.plan import PlanRow
from jqserve.checkpoint.store import restore
from jqserve.checkpoint.store_forecast import forecast_store
from jqserve.checkpoint.stream import Stream

__all__ = ["LoadedCheckpoint", "keep_on_host", "load"]


def load(
    path: str | Path | AnyCheckpoint,
    *,
    dtype: str | None = None,
    activations: Activations = "config",
    quantization: str | None = None,
    device_put: Place | None = None,
    decode: Literal["auto", "host", "device"] = "auto",
    progress: Progress | None = None,
    foretell: Foretell | None = None,
) -> LoadedCheckpoint:
    """Loads the directory or .gguf file `path`, or an open checkpoint, which is closed afterwards; its headers are
    checked as a whole before any tensor is read.

    dtype         of dense weights, norms, biases and the embedding: "bfloat16", "float16", "float32"; None or "auto":
                  the checkpoint's own. Scales keep their stored dtype, or are widened to float32
    activations   "none" leaves the input of activation-quantized Linears as it is, to look at the weights alone
    quantization  an online scheme for the Linears (not the head) of an unquantized checkpoint, as they stream in; on a
                  quantized one it must say what that is (`asked`). "torchao:NAME" is --torchao-config NAME
    device_put    called with each weight (array or QuantizedTensor), bias and norm as soon as it is built; what it
                  returns stands in the tree. None: `jax.device_put` to the default device. `keep_on_host` for numpy
    decode        "host": numpy; "device": raw tensors are sent as they are and repacked there; "auto": on the device
                  unless it is a CPU
    progress      called after each module
    foretell      called before the first, with what the headers show

    Host memory at its highest is about three times the largest module: one read ahead, one raw, one built.
    A directory that `jqserve convert` wrote is recognised by its manifest.
    Raises CheckpointError or UnsupportedError, before any device memory is taken for all that headers can show.
    """
    if isinstance(path, (str, Path)) and is_store(path):
        if foretell:
            foretell(*forecast_store(Path(path), dtype, activations, quantization))
        return restore(
            path,
            dtype=dtype,
            activations=activations,
            quantization=quantization,
            device_put=device_put or jax.device_put,
            progress=progress,
        )
    with open_checkpoint(path) as checkpoint:
        opened = open_model(checkpoint, dtype, activations, quantization)
        if foretell:
            foretell(opened.config, forecast(opened))
        stream = Stream.of(opened, device_put, decode)
        params: dict[str, Any] = {}
        rows: list[PlanRow] = []
        for done, built in enumerate(stream, 1):
            for name, leaf in built.leaves:
                set_path(params, name, leaf)
            rows += built.rows
            if progress:
                progress(done, len(stream), built.path)
        return LoadedCheckpoint(opened.config, params, opened.plan(rows), opened.generation_config)
