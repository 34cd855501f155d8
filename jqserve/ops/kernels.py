"""Which kernel a Linear's matmul takes on a device, for plans: asked of `pallas_kernels`' choices, without jax."""

from __future__ import annotations

import functools
from typing import Any

from jqserve.ops.device import Device
from jqserve.ops.layouts import needs_generic, preferred_layout, rows_as_they_are
from jqserve.quant import QuantSpec
from pallas_kernels.a16.choice import packed
from pallas_kernels.dispatch import Operand, choose
from pallas_kernels.scaled_matmul import choice as scaled_matmul
from pallas_kernels.w4a16 import choice as w4a16
from pallas_kernels.w8a16 import choice as w8a16

GENERIC = "generic (dequantized in the step, block by block)"


@functools.cache
def kernel(spec: QuantSpec | None, rows: int, dtype: str, scale_dtype: str, device: Device) -> str:
    """ "w4a16/decode_sm90", "scaled_matmul/xla", "dot_general", "generic (...)".

    spec    canonical; None: a dense weight
    rows    of x: the running requests of a decode step, the tokens of a prefill chunk
    dtype   of x; scale_dtype: of the weight's scales
    """
    if spec is None:
        return "dot_general (XLA)"
    if needs_generic(spec, device):
        return GENERIC
    if spec.activation.kind != "none":
        return _scaled(spec, rows, dtype, device)
    return _weight_only(spec, Operand((rows, spec.shape[1]), dtype), scale_dtype, device)


def kernel_runs(
    spec: QuantSpec | None, rows: tuple[int, ...], dtype: str, scale_dtype: str, device: Device
) -> list[tuple[str, int]]:
    """[("w4a16/decode_sm90", 8), ("w4a16/wgmma_sm90", 256)]: which kernel up to which of the ascending `rows`."""
    runs: list[tuple[str, int]] = []
    for m in rows:
        name = kernel(spec, m, dtype, scale_dtype, device)
        if runs and runs[-1][0] == name:
            runs.pop()
        runs.append((name, m))
    return runs


def _scaled(spec: QuantSpec, rows: int, dtype: str, device: Device) -> str:
    k = spec.shape[1]
    width = -(-k // 128) if spec.activation.kind == "dynamic_block" else 1
    operands = (
        Operand((rows, k), spec.qtype),
        Operand(spec.shape, spec.qtype),
        Operand((1 if spec.activation.kind == "static_tensor" else rows, width), "float32"),
        Operand(spec.grid, "float32"),
    )
    ways = scaled_matmul.CANDIDATES
    choice = choose(scaled_matmul.OP, ways, *operands, None, device=device, out_dtype=dtype)
    return _named("scaled_matmul", choice.chosen)


def _weight_only(spec: QuantSpec, x: Operand, scale_dtype: str, device: Device) -> str:
    four = spec.qtype == "uint4"
    grid = spec.grid if rows_as_they_are(spec) else (spec.shape[0], spec.grid[1])
    scale = Operand(grid, scale_dtype)
    zero = Operand(grid, "uint8") if spec.zero == "int" else None
    offset = Operand(grid, scale_dtype) if spec.zero == "offset" else None
    layout = preferred_layout(spec, device)
    qweight = Operand((spec.shape[0], spec.row_bytes), "uint8" if four else spec.qtype)
    if layout != "canonical":
        qweight, scale, zero, offset = packed(spec.shape, spec.group_size, layout, spec.qtype, scale, zero, offset)
    kwargs: dict[str, Any] = {"perm": None, "group_size": spec.group_size, "layout": layout}
    if four:
        ways = w4a16.CANDIDATES
        choice = choose(w4a16.OP, ways, x, qweight, scale, zero, device=device, offset=offset, **kwargs)
        return _named("w4a16", choice.chosen)
    choice = choose(w8a16.OP, w8a16.CANDIDATES, x, qweight, scale, zero, device=device, **kwargs)
    return _named("w8a16", choice.chosen)


def _named(op: str, chosen: str | None) -> str:
    return f"{op}/{chosen}" if chosen else f"{op}: no implementation takes it"
