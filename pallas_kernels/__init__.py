"""Quantized matmul, activation quantization and paged attention for JAX on NVIDIA GPUs.

Each op lives in a folder of its own (`api.py` is the public function, `reference.py` the oracle) and picks an
implementation for the device at hand; `explain(op, *args)` says which one and why. Importing this package touches
no device.
"""

from __future__ import annotations

import importlib
from typing import Any

from pallas_kernels import dispatch
from pallas_kernels.dispatch import KNOWN_DEVICES, Choice, Device, current_device, use_device

# Bound here at once because the functions are named like their folders: importing the folder later would
# otherwise shadow them.
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.scaled_matmul.api import scaled_matmul

# public name -> module that defines it; imported at first use.
_LAZY = {
    "quantize_rows": "pallas_kernels.quantize.api",
    "rms_norm_quantize": "pallas_kernels.quantize.api",
    "silu_mul_quantize": "pallas_kernels.quantize.api",
    "rms_norm": "pallas_kernels.rows.api",
    "silu_mul": "pallas_kernels.rows.api",
    "w4a16_matmul": "pallas_kernels.w4a16.api",
    "w8a16_matmul": "pallas_kernels.w8a16.api",
    "write_kv": "pallas_kernels.paged_attention.api",
    "decode_attention": "pallas_kernels.paged_attention.api",
    "prefill_attention": "pallas_kernels.paged_attention.api",
}

__all__ = [
    "KNOWN_DEVICES",
    "Choice",
    "Device",
    "current_device",
    "decode_attention",
    "explain",
    "grouped_matmul",
    "prefill_attention",
    "quantize_rows",
    "rms_norm",
    "rms_norm_quantize",
    "scaled_matmul",
    "silu_mul",
    "silu_mul_quantize",
    "use_device",
    "w4a16_matmul",
    "w8a16_matmul",
    "write_kv",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def explain(op: str, *args: Any, device: Device | None = None, **kwargs: Any) -> Choice:
    """Says which implementation `op` takes for `args` (arrays or ShapeDtypeStructs) on `device`, and why.

    `op` is the name of a public function of this package, `args` and `kwargs` are that function's own, e.g.
    `explain("scaled_matmul", xq, wq, x_scale, w_scale, device=KNOWN_DEVICES["l4"])`. Nothing runs.
    """
    if op in _LAZY:
        importlib.import_module(_LAZY[op])
    return dispatch.explain(op, *args, device=device, **kwargs)
