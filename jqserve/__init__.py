"""jqserve: quantized LLM serving in JAX.

    import jqserve
    model, params = jqserve.load("path/to/checkpoint", dtype="float32")
    logits = model(params, tokens)  # tokens int32 [S] or [B, S] -> float32 [..., S, V]

Names are imported on first use: `import jqserve` loads no jax and touches no device, so that `jqserve.client` stays
light and environment variables set after the import still count.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jqserve.engine.api import Engine
    from jqserve.engine.completion import Completion
    from jqserve.engine.config import EngineConfig
    from jqserve.engine.request import SamplingParams
    from jqserve.errors import CheckpointError, JqserveError, RequestError, UnsupportedError
    from jqserve.library import Model, dequantize, greedy, load
    from jqserve.quant import ActivationSpec, QuantizedTensor, QuantSpec

_HOMES = {
    "ActivationSpec": "jqserve.quant",
    "CheckpointError": "jqserve.errors",
    "Completion": "jqserve.engine.completion",
    "Engine": "jqserve.engine.api",
    "EngineConfig": "jqserve.engine.config",
    "JqserveError": "jqserve.errors",
    "Model": "jqserve.library",
    "QuantSpec": "jqserve.quant",
    "QuantizedTensor": "jqserve.quant",
    "RequestError": "jqserve.errors",
    "SamplingParams": "jqserve.engine.request",
    "UnsupportedError": "jqserve.errors",
    "dequantize": "jqserve.library",
    "greedy": "jqserve.library",
    "load": "jqserve.library",
}

__all__ = [
    "ActivationSpec",
    "CheckpointError",
    "Completion",
    "Engine",
    "EngineConfig",
    "JqserveError",
    "Model",
    "QuantSpec",
    "QuantizedTensor",
    "RequestError",
    "SamplingParams",
    "UnsupportedError",
    "dequantize",
    "greedy",
    "load",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jqserve' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
