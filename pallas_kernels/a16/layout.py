"""The "sm90" layout of both ops, its names and sizes, and no jax: weights in fragment order, group tables beside them,
odd shapes padded.

The name is "sm90", or "sm90:NxK" for a weight of N x K that had to be padded: the packed arrays alone do not tell N.
Weights become [N/16, ...] as in `fragments`; scales, zeros and offsets [N, G] become [N/16, G, 8, 2], except scales of
one group without an offset, which stay [N, 1] because the kernels apply them to finished sums, and anything [1, 1].
Padded rows and groups hold zeros; padded columns meet zeros of x. `fragments` and `tables` make the arrays.
"""

from __future__ import annotations

import dataclasses
import math
import re

from pallas_kernels.a16.stored import ROWS
from pallas_kernels.dispatch import Device

PAD_N = 64  # rows of one warpgroup's wgmma
PAD_K = 256  # 4 blocks of 4-bit weights, so that at least 4 warps may share them


@dataclasses.dataclass(frozen=True)
class Layout:
    """`n`, `k`: the weight's own sizes if it was padded, else None."""

    n: int | None = None
    k: int | None = None

    @property
    def name(self) -> str:
        return "sm90" if self.n is None else f"sm90:{self.n}x{self.k}"


def parse(op: str, layout: str) -> Layout | None:
    """None for "canonical". Raises ValueError for a name that is no layout."""
    if layout == "canonical":
        return None
    match = re.fullmatch(r"sm90(?::(\d{1,9})x(\d{1,9}))?", layout)
    if match is None:
        raise ValueError(f"{op}: unknown layout {layout!r}; known: canonical, sm90, sm90:NxK")
    return Layout() if match[1] is None else Layout(int(match[1]), int(match[2]))


def preferred(n: int, k: int, group_size: int, device: Device) -> str:
    """The layout's name for a weight on `device`; "canonical" where no kernel of this package would run."""
    if device.compute_capability != (9, 0) or refusal(group_size, k) or k % 2:
        return "canonical"
    padded = padded_shape(n, k, group_size) != (n, k)
    return (Layout(n, k) if padded else Layout()).name


def refusal(group_size: int, k: int) -> str | None:
    """Why no kernel takes groups of this size, or None."""
    if (
        group_size == -1
        or group_size >= k
        or (group_size % 16 == 0 and (256 % group_size == 0 or group_size % 64 == 0))
    ):
        return None
    return f"groups of {group_size} (supported: 16, 32, multiples of 64, or all of K)"


def padded_shape(n: int, k: int, group_size: int) -> tuple[int, int]:
    step = PAD_K if group_size == -1 or group_size >= k else math.lcm(PAD_K, group_size)
    return -(-n // PAD_N) * PAD_N, -(-k // step) * step


def groups_of(columns: int, k: int, group_size: int) -> int:
    """Groups along `columns` (k, or k padded): one if a group covers all of k."""
    return 1 if group_size == -1 or group_size >= k else -(-columns // group_size)


def table_shape(shape: tuple[int, ...], rows: int, groups: int) -> tuple[int, ...]:
    """What a table [N, G] becomes: [rows/16, groups, 8, 2]; [1, 1] stays; a single column [N, 1] stays one group."""
    return shape if shape == (1, 1) else (rows // ROWS, groups if shape[1] > 1 else 1, 8, 2)


def scale_shape(shape: tuple[int, ...], rows: int, groups: int, has_offset: bool) -> tuple[int, ...]:
    """As `table_shape`, but a single column without an offset stays [N, 1]."""
    column = shape[1] == 1 and shape[0] > 1 and not has_offset
    return (rows, 1) if column else table_shape(shape, rows, groups)


def check_packed(op: str, shape: tuple[int, ...], k: int, group_size: int, bytes_per_k: int) -> None:
    """Raises ValueError unless `shape` is a packed weight's for x of K columns. bytes_per_k: of 16 rows' values."""
    width = bytes_per_k * padded_shape(1, k, group_size)[1]
    if len(shape) != 2 or shape[1] != width:
        wanted = f"[ceil(N/64) * 4, {width}] for K = {k} and groups of {group_size}"
        raise ValueError(f"{op}: qweight in the sm90 layout, as `to_layout` returns it, is {wanted}; got {shape}")


def check(op: str, layout: str, n: int, k: int, group_size: int) -> None:
    """Raises ValueError unless `layout` is the name that this weight's padding calls for."""
    reason = refusal(group_size, k)
    padded = padded_shape(n, k, group_size) != (n, k)
    wanted = (Layout(n, k) if padded else Layout()).name
    if reason or wanted != layout:
        found = f"{reason} keep the canonical layout" if reason else f"it is {wanted!r}, not {layout!r}"
        raise ValueError(f"{op}: layout of a {n} x {k} weight, group {group_size}: {found}")
