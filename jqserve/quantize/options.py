"""`Options`: what a user asked `jqserve quantize` for, checked and with its defaults filled in."""

from __future__ import annotations

import dataclasses
from typing import Any

from jqserve.errors import RequestError
from jqserve.quantize.formats.awq import Awq
from jqserve.quantize.formats.compressed_tensors import CompressedTensors
from jqserve.quantize.formats.format import Format
from jqserve.quantize.formats.fp8 import BlockFp8
from jqserve.quantize.formats.gptq import Gptq
from jqserve.quantize.grid import Grid
from jqserve.quantize.schemes import SCHEMES, Algorithm, Scheme

#: Tokens of calibration data on the device at a time.
CHUNK_TOKENS = 16384

#: Group sizes that GPTQModel (7.6, its torch kernel; the others take fewer) loads.
GPTQ_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Options:
    """None is the scheme's default. Raises RequestError, naming the flag, for what the scheme does not have.

    scheme         a key of SCHEMES
    format         one of the scheme's formats
    bits           4 or 8 for gptq
    group_size     values along K that share a scale; -1: all
    symmetric      False: with zero points
    act_order      gptq: columns in the order of falling Hessian diagonal
    static_groups  with act_order: groups are those of the original order, fixed first; the file needs no g_idx
    damp           gptq: added to the Hessian's diagonal, as a share of its mean
    gptq           w8a8-int8: GPTQ instead of rounding
    smoothquant    w8a8-int8: alpha of SmoothQuant (arXiv:2211.10438), or None
    search_tokens  awq: tokens by which a scale is judged at the output of attention and MLP
    clip           awq: also search for the range of every group
    kv_cache       "fp8": scales of keys and values are calibrated and stored; or "none"
    ignore         names of Linears, or "re:" and a regular expression that matches their beginning
    """

    scheme: str
    format: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool = False
    static_groups: bool = False
    damp: float = 0.01
    gptq: bool = False
    smoothquant: float | None = None
    search_tokens: int = 65536
    clip: bool = True
    kv_cache: str = "none"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise RequestError("--scheme", f"{self.scheme!r} is not one of {', '.join(SCHEMES)}")
        row = self.row
        self._one_of("--format", self.format, row.formats)
        self._one_of("--bits", self.bits, row.bits)
        if self.group_size is not None:
            if not row.grouped:
                raise RequestError("--group-size", f"{self.scheme} has none: {row.summary}")
            if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
                raise RequestError("--group-size", f"must be -1 or a multiple of 8, found {self.group_size}")
            if self.written in ("gptq", "gptq_v2") and self.group_size not in GPTQ_GROUPS:
                raise RequestError(
                    "--group-size",
                    f"{self.group_size} is none that GPTQModel loads: {', '.join(map(str, GPTQ_GROUPS))}; add --format "
                    "compressed-tensors for others",
                )
        if self.symmetric is False and not row.zero_points:
            raise RequestError("--asym", f"{self.scheme} is symmetric in every format")
        if self.scheme == "awq" and self.symmetric and self.format != "compressed-tensors":
            raise RequestError("--sym", "AutoAWQ's files always have zero points; add --format compressed-tensors")
        if self.gptq and "gptq" not in row.algorithms:
            raise RequestError("--gptq", f"belongs to w8a8-int8 (or use --scheme gptq), not to {self.scheme}")
        if self.smoothquant is not None and self.scheme != "w8a8-int8":
            raise RequestError("--smoothquant", f"belongs to w8a8-int8, not to {self.scheme}")
        if self.smoothquant is not None and not 0 <= self.smoothquant <= 1:
            raise RequestError("--smoothquant", f"must be from 0 to 1, found {self.smoothquant}")
        if (self.act_order or self.static_groups) and self.algorithm != "gptq":
            raise RequestError("--act-order", f"belongs to GPTQ, not to {self.scheme}")
        if self.static_groups and not self.act_order:
            raise RequestError("--static-groups", "only matters with --act-order")
        moved = self.act_order and not self.static_groups and row.grouped and self.group_size != -1
        if moved and self.written == "compressed-tensors":
            raise RequestError(
                "--act-order",
                "moves columns between groups, and compressed-tensors (0.20) does not read such files any more; add "
                "--static-groups, or use --format gptq",
            )
        if not 0 < self.damp < 1:
            raise RequestError("--damp", f"must be between 0 and 1, found {self.damp}")
        if self.search_tokens < 1:
            raise RequestError("--search-tokens", f"must be at least 1, found {self.search_tokens}")
        self._one_of("--kv-cache", self.kv_cache, ("none", "fp8"))

    def _one_of(self, flag: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if value is not None and value not in allowed:
            found = ", ".join(map(str, allowed))
            raise RequestError(flag, f"{value} is not one of {found} (--scheme {self.scheme})")

    @property
    def row(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def algorithm(self) -> Algorithm:
        return "gptq" if self.gptq else self.row.algorithms[0]

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is needed."""
        static = self.row.inputs == "static"
        return self.algorithm != "rtn" or static or self.smoothquant is not None or self.kv_cache != "none"

    @property
    def written(self) -> str:
        """The format's name. Zero points default to GPTQ's version 2: GPTQModel loads them in version 1 only from files
        of its own making."""
        default = self.row.formats[0]
        return self.format or ("gptq_v2" if default == "gptq" and self.symmetric is False else default)

    def writer(self) -> Format:
        name = self.written
        if name == "compressed-tensors":
            return CompressedTensors()
        others: tuple[Format, ...] = (Gptq(1), Gptq(2), Awq(), BlockFp8())
        return next(writer for writer in others if writer.name == name)

    def grid(self, model_dtype: str) -> Grid:
        """The grid of every quantized Linear of a model of `model_dtype`."""
        row, form = self.row, self.written
        group = row.group
        if row.grouped and self.group_size is not None:
            group = (1, 0 if self.group_size == -1 else self.group_size)
        symmetric = row.symmetric if self.symmetric is None else self.symmetric
        like_peers = form == "compressed-tensors" and self.algorithm == "rtn" and self.smoothquant is None
        return Grid(
            kind=row.kind,
            bits=self.bits or row.bits[0],
            symmetric=symmetric,
            group=group,
            scale_dtype={"compressed-tensors": model_dtype, "fp8": "float32"}.get(form, "float16"),
            native=model_dtype if like_peers else "float32",
            reciprocal=form == "fp8",
            min_zero=1 if form == "gptq" and not symmetric else 0,
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
