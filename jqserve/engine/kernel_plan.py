"""The load plan with the kernel of every Linear: the same words in `jqserve plan`, at the server start, in its info."""

from __future__ import annotations

import dataclasses

from jqserve.checkpoint.plan import LoadPlan, PlanRow
from jqserve.ops.device import Device
from jqserve.ops.kernels import kernel, kernel_runs


def with_kernels(plan: LoadPlan, device: Device, dtype: str, decode: tuple[int, ...], prefill: int) -> LoadPlan:
    """`plan` whose rows say what runs on `device`, for `dtype` inputs.

    decode   row counts of the steps without prefill, ascending (`Buckets.decode`): few rows may take another kernel
    prefill  tokens of a whole prefill chunk
    """
    return dataclasses.replace(plan, rows=tuple(_row(r, device, dtype, decode, prefill) for r in plan.rows))


def _row(row: PlanRow, device: Device, dtype: str, decode: tuple[int, ...], prefill: int) -> PlanRow:
    if row.path == "embed":
        return row
    runs = kernel_runs(row.spec, decode, dtype, row.dtype, device)
    last, names = kernel(row.spec, prefill, dtype, row.dtype, device), [name for name, _ in runs]
    if set(names) == {last}:
        return dataclasses.replace(row, kernel=last)
    up_to = [f"{name} up to {rows} rows" for name, rows in runs[:-1]]
    return dataclasses.replace(row, kernel=f"decode {', then '.join([*up_to, names[-1]])}, prefill {last}")
