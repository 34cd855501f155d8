"""The load plan with the kernel of every Linear: the same words in `jqserve plan`, at the server start, in its info."""

from __future__ import annotations

import dataclasses

from jqserve.checkpoint.plan import LoadPlan, PlanRow
from jqserve.ops.device import Device
from jqserve.ops.kernels import kernel


def with_kernels(plan: LoadPlan, device: Device, dtype: str, decode_rows: int, prefill_rows: int) -> LoadPlan:
    """`plan` whose rows say what runs on `device` for decode_rows and for prefill_rows tokens of `dtype`."""
    return dataclasses.replace(plan, rows=tuple(_row(r, device, dtype, decode_rows, prefill_rows) for r in plan.rows))


def _row(row: PlanRow, device: Device, dtype: str, decode_rows: int, prefill_rows: int) -> PlanRow:
    if row.path == "embed":
        return row
    decode, prefill = (kernel(row.spec, rows, dtype, row.dtype, device) for rows in (decode_rows, prefill_rows))
    return dataclasses.replace(row, kernel=decode if decode == prefill else f"decode {decode}, prefill {prefill}")
