"""Attention over paged keys and values."""

from pallas_kernels.paged_attention.api import decode_attention, prefill_attention, write_kv

__all__ = ["decode_attention", "prefill_attention", "write_kv"]
