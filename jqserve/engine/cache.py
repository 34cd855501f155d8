"""The KV pool's arrays: how large, of which type (asked by plans too, without jax), and making them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 by its name then
import numpy as np

from jqserve.errors import JqserveError, UnsupportedError
from jqserve.models.config import ModelConfig
from jqserve.ops.device import Device

if TYPE_CHECKING:
    import jax

KV_DTYPES = {
    "float32": np.dtype("float32"),
    "bfloat16": np.dtype("bfloat16"),
    "float16": np.dtype("float16"),
    "fp8_e4m3": np.dtype("float8_e4m3fn"),
    "fp8_e5m2": np.dtype("float8_e5m2"),
}
CHECKPOINT_SCALES = "scales of the checkpoint"
#: Names of other servers and habits.
ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "fp8_e4m3"}

type Cache = tuple[tuple[jax.Array, jax.Array], ...]  # one (k_pages, v_pages) [P, Hkv, Ps, Dh] per layer


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """P pages (page 0 is the trash page, so P - 1 can be used) of Ps tokens, for L layers."""

    layers: int
    pages: int
    kv_heads: int
    page_size: int
    head_dim: int
    dtype: str  # a key of KV_DTYPES

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        item = KV_DTYPES[self.dtype].itemsize
        return 2 * self.layers * self.kv_heads * self.page_size * self.head_dim * item

    @property
    def tokens(self) -> int:
        return (self.pages - 1) * self.page_size

    @property
    def layer(self) -> tuple[int, int, int, int]:
        return self.pages, self.kv_heads, self.page_size, self.head_dim

    def abstract(self) -> Any:
        import jax

        leaf = jax.ShapeDtypeStruct(self.layer, KV_DTYPES[self.dtype])
        return ((leaf, leaf),) * self.layers


def slow_pages(shape: CacheShape, device: Device) -> str | None:
    """Why the attention kernels of a Hopper GPU do not take such pages; None where they do, or where there are none."""
    block = 64 if shape.head_dim > 128 else 128  # keys that the prefill kernel takes at once; decode takes 16
    if device.compute_capability != (9, 0) or (shape.page_size % 16 == 0 and block % shape.page_size == 0):
        return None
    *few, last = (str(size) for size in (16, 32, 64, 128) if size <= block)
    return (
        f"KV pages of {shape.page_size} tokens: no attention kernel takes them, so that attention runs in XLA, several "
        f"times slower; --page-size {', '.join(few)} or {last} has kernels"
    )


def cache_shape(config: ModelConfig, *, page_size: int, pages: int, dtype: str) -> CacheShape:
    """`dtype`: what `kv_dtype` gives. `pages` usable ones."""
    return CacheShape(config.layers, pages + 1, config.kv_heads, page_size, config.head_dim, dtype)


def kv_dtype(asked: str, computed: str, scaled: bool) -> str:
    """--kv-cache-dtype: "auto" is what the checkpoint asks for, fp8 where it has scales, else the compute dtype.

    Raises UnsupportedError for a name that there is not.
    """
    if asked == "auto":
        return "fp8_e4m3" if scaled else computed
    dtype = ALIASES.get(asked, asked)
    if dtype not in KV_DTYPES:
        raise UnsupportedError(
            f"--kv-cache-dtype {asked} is not supported; supported: auto, {', '.join(KV_DTYPES)} "
            f"({', '.join(ALIASES)} are taken for them)"
        )
    return dtype


def kv_source(dtype: str, scaled: bool) -> str:
    """Where the scales of an fp8 cache come from, for people; "" for a wider cache of a checkpoint without scales."""
    if dtype.startswith("fp8"):
        return CHECKPOINT_SCALES if scaled else "scale 1.0 for every layer: the checkpoint has none"
    return "the checkpoint's fp8 scales are not used" if scaled else ""


def make_cache(shape: CacheShape, device: Any = None) -> Cache:
    """Zeroed pages, each array its own buffer (they are donated to every step)."""
    import jax.numpy as jnp

    return tuple(
        (
            jnp.zeros(shape.layer, KV_DTYPES[shape.dtype], device=device),
            jnp.zeros(shape.layer, KV_DTYPES[shape.dtype], device=device),
        )
        for _ in range(shape.layers)
    )


def pages_that_fit(
    *, page_bytes: int, limit: int, in_use: int, static_bytes: int, activation_bytes: int, most: int
) -> int:
    """Usable pages of a GPU pool.

    limit         bytes that XLA may allocate; in_use: what weights and per-slot state hold already
    static_bytes  the share of the GPU meant for weights and pages (--mem-fraction-static)
    activation_bytes  what the worst step needs beside them
    most          pages that all slots at full context could use
    """
    budget = min(static_bytes, limit - activation_bytes) - in_use
    pages = budget // page_bytes - 1
    if pages < 1:
        raise JqserveError(
            f"no memory is left for KV pages: {in_use / 2**30:.2f} GiB in use, {activation_bytes / 2**30:.2f} GiB for "
            f"activations, {static_bytes / 2**30:.2f} GiB allowed for weights and pages. Raise --mem-fraction-static, "
            "lower --max-running-requests or --chunked-prefill-size, or choose a smaller or quantized checkpoint"
        )
    return int(min(pages, most))


def round_pages(pages: int) -> int:
    """A little fewer (under 1.6 %), so that a few bytes more or less do not make other programs of every start."""
    step = 2 ** max(0, (pages // 64).bit_length() - 1)
    return pages - pages % step
