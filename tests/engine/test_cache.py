"""Page sizes: what is said of them is what the kernels take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jqserve.engine.cache import CacheShape, slow_pages
from pallas_kernels import explain
from pallas_kernels.dispatch import KNOWN_DEVICES

HOPPER = KNOWN_DEVICES["h200"]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [7, 8, 16, 32, 48, 64, 128, 256])
def test_slow_pages_are_those_that_no_kernel_takes(page_size: int, head_dim: int) -> None:
    S = jax.ShapeDtypeStruct
    few, table = S((2,), jnp.int32), S((2, 4), jnp.int32)
    pages = S((9, 2, page_size, head_dim), jnp.bfloat16)
    scale = head_dim**-0.5
    q = S((2, 4, head_dim), jnp.bfloat16)
    decode = explain("decode_attention", q, pages, pages, table, few, sm_scale=scale, device=HOPPER)
    tiles = S((2, 128, 4, head_dim), jnp.bfloat16)
    prefill = explain("prefill_attention", tiles, pages, pages, table, few, few, sm_scale=scale, device=HOPPER)
    taken = "xla" not in (decode.chosen, prefill.chosen)
    shape = CacheShape(2, 9, 2, page_size, head_dim, "bfloat16")
    assert (slow_pages(shape, HOPPER) is None) == taken, (decode, prefill)
    assert slow_pages(shape, KNOWN_DEVICES["l4"]) is None  # XLA takes all alike


def test_what_is_said_names_sizes_that_have_kernels() -> None:
    assert "7 tokens" in (said := slow_pages(CacheShape(2, 9, 2, 7, 256, "bfloat16"), HOPPER) or "")
    assert said.endswith("--page-size 16, 32 or 64 has kernels")
