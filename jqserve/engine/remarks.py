"""What a load plan's rows leave to say: why modules stay unquantized, and warnings. The same in `jqserve plan` and when
the server begins to load."""

from __future__ import annotations

import dataclasses
import re

from jqserve.checkpoint.forecast import Forecast
from jqserve.checkpoint.plan import LoadPlan, ranges
from jqserve.checkpoint.quant_config import NOT_QUANTIZED
from jqserve.ops.kernels import GENERIC

EMBEDDING = "model.embed_tokens"


def before_loading(plan: LoadPlan, found: Forecast) -> str:
    """The table of `plan` (found's, with kernels), what it does not show, and the memory that loading will need."""
    device, host = (nbytes / 2**30 for nbytes in found.peak_bytes(plan.bytes + found.vectors))
    lines = [plan.to_text()]
    lines += [f"  unquantized: {name}: {reason}" for name, reason in folded(found.unquantized).items()]
    lines += [f"  warning: {warning}" for warning in of_rows(plan)]
    lines.append(f"  while loading at most about {device:.3f} GiB of the device, {host:.3f} of the host")
    return "\n".join(lines)


def folded(unquantized: dict[str, str]) -> dict[str, str]:
    """Modules that differ in the layer alone and have one reason share a line: "model.layers.{0-5}.mlp.down_proj". An
    unquantized checkpoint has one for all."""
    linears = {name: reason for name, reason in unquantized.items() if name != EMBEDDING}
    if linears and set(linears.values()) == {NOT_QUANTIZED}:
        rest = {EMBEDDING: unquantized[EMBEDDING]} if EMBEDDING in unquantized else {}
        return rest | {"every Linear": NOT_QUANTIZED}
    layers: dict[tuple[str, str], list[int]] = {}
    for name, reason in unquantized.items():
        match = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
        key = (f"{match[1]}{{}}{match[3]}" if match else name, reason)
        layers.setdefault(key, []).extend([int(match[2])] if match else [])
    return {
        name.replace("{}", str(numbers[0]) if len(numbers) == 1 else f"{{{ranges(numbers)}}}"): reason
        for (name, reason), numbers in layers.items()
    }


def of_rows(plan: LoadPlan) -> list[str]:
    """Warnings that the rows with their kernels give: mixed schemes, parts kept apart, no packed kernel."""
    quantized = [row for row in plan.rows if row.spec is not None]
    kinds = list(
        dict.fromkeys(dataclasses.replace(r.spec, shape=(1, 1), group_shape=(1, 1)) for r in quantized if r.spec)
    )
    found = []
    if len(kinds) > 1:
        found.append(f"mixed schemes: {'; '.join(dict.fromkeys(row.scheme for row in quantized))}")
    found += list(dict.fromkeys(f"{row.path.rpartition('.')[2]}: {row.note}" for row in plan.rows if row.note))
    if any(GENERIC in row.kernel for row in plan.rows):
        found.append("no packed kernel for some modules: they are dequantized in every step (see kernel)")
    return found
