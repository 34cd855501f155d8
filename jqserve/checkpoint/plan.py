"""`LoadPlan`: what was made of each module, for people (a table) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from rich.table import Table

from jqserve.quant import ActivationSpec, QuantSpec


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One canonical Linear (or the embedding).

    path        canonical path, "layers.0.attn.qkv"
    source      the Hugging Face modules it is made of, "model.layers.0.self_attn.{q,k,v}_proj"
    scheme      the format and the arithmetic in words
    bits        of one weight as stored in memory
    group       values along K that share a scale; None: one a channel or a tensor, or no scales
    activation  how the matmul quantizes its input, in words
    dtype       of dense weights, else of the scales
    bytes       of the canonical arrays
    spec        of the canonical weight; None: dense
    kernel      "decode w4a16/decode_sm90 up to 8 rows, then w4a16/wgmma_sm90, prefill w4a16/wgmma_sm90"; "" where
                nobody has asked
    note        "" or what a reader should know ("kept apart: input scales differ")
    """

    path: str
    source: str
    shape: tuple[int, int]
    scheme: str
    bits: int
    group: int | None
    activation: str
    dtype: str
    bytes: int
    note: str = ""
    spec: QuantSpec | None = None
    kernel: str = ""


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """The rows in loading order, the method ("gptq", "online: fp8", "none"), and notes that concern the whole model."""

    method: str
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all the rows, norms and biases not counted."""
        return sum(row.bytes for row in self.rows)

    @property
    def dense_linears(self) -> list[tuple[str, int, int]]:
        """(path, n, k) of the layers' matrices that are not quantized."""
        return [(row.path, *row.shape) for row in self.rows if row.spec is None and row.path.startswith("layers.")]

    def to_json(self) -> dict[str, Any]:
        """{"method", "bytes", "rows": [...], "notes": [...]}, all plain JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"method": self.method, "bytes": self.bytes, "rows": rows, "notes": list(self.notes)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> LoadPlan:
        rows = tuple(_row_from_json(row) for row in data["rows"])
        return LoadPlan(data["method"], rows, tuple(data["notes"]))

    def to_table(self) -> Table:
        """Rows that differ only in the layer's number share a line: "layers.{0-5}.attn.qkv"."""
        table = Table(title=f"load plan: {self.method}, {self.bytes / 2**20:,.1f} MiB", title_justify="left")
        for name in ("module", "[N, K]", "scheme", "activation", "dtype", "MiB", "kernel", "note"):
            table.add_column(name, justify="right" if name == "MiB" else "left", no_wrap=name in ("module", "[N, K]"))
        for label, row, total in self._folded():
            n, k = row.shape
            table.add_row(
                label,
                f"{n} x {k}",
                row.scheme,
                row.activation,
                row.dtype,
                f"{total / 2**20:,.2f}",
                row.kernel,
                row.note,
            )
        for note in self.notes:
            table.caption = f"{table.caption}\n{note}" if table.caption else note
        return table

    def to_text(self) -> str:
        """The table as plain lines, for logs and for the engine's progress message."""
        lines = [f"load plan: {self.method}, {self.bytes / 2**20:,.1f} MiB"]
        for label, row, total in self._folded():
            note = (f"; {row.kernel}" if row.kernel else "") + (f"  ({row.note})" if row.note else "")
            lines.append(
                f"  {label:<28} {row.shape[0]:>6} x {row.shape[1]:<6} {row.scheme}; activation {row.activation}; "
                f"{row.dtype}; {total / 2**20:,.2f} MiB{note}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _folded(self) -> list[tuple[str, PlanRow, int]]:
        folded: dict[Any, tuple[PlanRow, list[int], int]] = {}
        for row in self.rows:
            match = re.fullmatch(r"layers\.(\d+)\.(.*)", row.path)
            tail = match[2] if match else row.path
            key = (tail, dataclasses.replace(row, path="", source=""))
            first, layers, total = folded.get(key, (row, [], 0))
            folded[key] = (first, layers + ([int(match[1])] if match else []), total + row.bytes)
        return [(_label(key[0], layers), row, total) for key, (row, layers, total) in folded.items()]


def _row_from_json(data: dict[str, Any]) -> PlanRow:
    spec = data.get("spec")
    return PlanRow(**{**data, "shape": tuple(data["shape"]), "spec": QuantSpec.from_json(spec) if spec else None})


def _label(tail: str, layers: list[int]) -> str:
    return f"layers.{ranges(layers)}.{tail}" if layers else tail


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def activation_text(activation: ActivationSpec) -> str:
    """ "fp8 per token", "int8 static per tensor (absmax / 127.5)", "none"."""
    if activation.kind == "none":
        return "none"
    kind = {"dynamic_token": "per token", "static_tensor": "static per tensor", "dynamic_block": "per block"}
    name = {"float8_e4m3fn": "fp8", "int8": "int8"}[activation.qtype or ""]
    divisor = f", absmax/{activation.divisor:g}" if activation.qtype == "int8" else ""
    return f"{name} {kind[activation.kind]}{divisor}"


def input_text(method: str, spec: QuantSpec) -> str:
    """How the matmul quantizes its input. torchao scales the whole input by one number where its weight has one scale;
    a scale a token keeps a request apart from its company, so that is what runs, and it is said."""
    text = activation_text(spec.activation)
    torchao = method == "torchao" or (method == "online" and spec.activation.qtype == "float8_e4m3fn")
    if torchao and spec.group_shape == spec.shape and spec.activation.kind == "dynamic_token":
        text += " (torchao: per tensor)"
    return text


def scheme_text(method: str, spec: QuantSpec | None, perm: bool = False) -> str:
    """ "awq: uint4, groups of 128, zero points", "dense"."""
    if spec is None:
        return method
    k, (gn, gk) = spec.shape[1], spec.group_shape
    group = f"groups of {gk}" if gk < k else ("per channel" if gn == 1 else "per tensor")
    group = f"blocks of {gn}x{gk}" if (gn, gk) == (128, 128) else group
    zero = {"none": "", "int": ", zero points", "offset": ", offsets"}[spec.zero]
    return f"{method}: {spec.qtype}, {group}{zero}{', act-order' if perm else ''}"


def joined_notes(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def source_text(names: list[str]) -> str:
    """["a.b.q_proj", "a.b.k_proj"] -> "a.b.{q_proj,k_proj}"."""
    if len(names) == 1:
        return names[0]
    return f"{names[0].rpartition('.')[0]}.{{{','.join(name.rpartition('.')[2] for name in names)}}}"
