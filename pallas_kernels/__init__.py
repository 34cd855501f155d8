"""Quantized matmul, activation quantization, paged attention and sampling for JAX on NVIDIA GPUs.

Each op lives in a folder of its own (`api.py` is the public function, `reference.py` the oracle) and picks an
implementation for the device at hand; `explain(op, *args)` says which one and why. Where `choice.py` stands beside
them, it decides from shapes and dtypes alone. Names are imported on first use: importing this package touches no device
and loads no jax.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from pallas_kernels import dispatch
from pallas_kernels.dispatch import KNOWN_DEVICES, Choice, Device, current_device, use_device

if TYPE_CHECKING:
    from pallas_kernels.grouped_matmul.api import grouped_matmul
    from pallas_kernels.paged_attention.api import decode_attention, prefill_attention, write_kv
    from pallas_kernels.quantize.api import quantize_rows, rms_norm_quantize, silu_mul_quantize
    from pallas_kernels.rope_write.api import rope_write
    from pallas_kernels.rows.api import rms_norm, silu_mul
    from pallas_kernels.sample.api import sample
    from pallas_kernels.scaled_matmul.api import scaled_matmul
    from pallas_kernels.w4a16.api import w4a16_matmul
    from pallas_kernels.w8a16.api import w8a16_matmul

# public name -> module that defines it; imported at first use.
_LAZY = {
    "grouped_matmul": "pallas_kernels.grouped_matmul.api",
    "sample": "pallas_kernels.sample.api",
    "scaled_matmul": "pallas_kernels.scaled_matmul.api",
    "quantize_rows": "pallas_kernels.quantize.api",
    "rms_norm_quantize": "pallas_kernels.quantize.api",
    "silu_mul_quantize": "pallas_kernels.quantize.api",
    "rope_write": "pallas_kernels.rope_write.api",
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
    "rope_write",
    "sample",
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


class _Package(types.ModuleType):
    """Some ops are named like their folders: importing a folder must not put the folder in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def explain(op: str, *args: Any, device: Device | None = None, **kwargs: Any) -> Choice:
    """Says which implementation `op` takes for `args` (arrays or ShapeDtypeStructs) on `device`, and why.

    `op` is the name of a public function of this package, `args` and `kwargs` are that function's own, e.g.
    `explain("scaled_matmul", xq, wq, x_scale, w_scale, device=KNOWN_DEVICES["l4"])`. Nothing runs. Raises ValueError
    for an unknown op, and where the function itself would.
    """
    if op not in _LAZY:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(sorted(_LAZY))}")
    return dispatch.explain(op, getattr(sys.modules[__name__], op), *args, device=device, **kwargs)
