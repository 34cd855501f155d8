"""The residual stream of all calibration samples, on the host in chunks; the device holds one chunk, and the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.quantize.host import Kept, fetch, keep, pins
from jqserve.quantize.options import CHUNK_TOKENS
from jqserve.quantize.pace import in_steps

#: Bytes that are pinned at most; a larger stream stays in ordinary memory.
MOST_PINNED = 32 << 30


class Activations:
    """Chunks [B, S, D] of samples, in order. The order never changes, so sums over chunks are the same in every run."""

    def __init__(self, chunks: Sequence[np.ndarray], *, pinned: bool | None = None) -> None:
        """`pinned`: whether the chunks are kept in pinned memory; None: on a GPU, if there are not too many."""
        few = sum(chunk.nbytes for chunk in chunks) <= MOST_PINNED
        self._pinned = (pins() and few) if pinned is None else pinned
        self.chunks: list[Kept] = [keep(chunk, pinned=self._pinned) for chunk in chunks]

    @staticmethod
    def embed(samples: np.ndarray, table: np.ndarray, dtype: str, chunk_tokens: int = CHUNK_TOKENS) -> Activations:
        """samples int32 [n, S] -> their embeddings, in `dtype`; table [V, D]"""
        size = max(1, chunk_tokens // samples.shape[1])
        cuts = [samples[i : i + size] for i in range(0, len(samples), size)]
        return Activations([np.take(table, ids, axis=0).astype(dtype) for ids in cuts])

    @property
    def rows(self) -> int:
        """Tokens in all."""
        return sum(chunk.shape[0] * chunk.shape[1] for chunk in self.chunks)

    def __iter__(self) -> Iterator[jax.Array]:
        """Chunks on the device, one sent ahead. A chunk may be replaced once the next one has been taken."""
        waiting = None
        for chunk in self.chunks:
            ready, waiting = waiting, fetch(chunk)
            if ready is not None:
                yield ready
        if waiting is not None:
            yield waiting

    def replace(self, function: Callable[[jax.Array], jax.Array]) -> None:
        """Every chunk becomes function(chunk), which has its shape; the results leave the device as they come."""
        flying: jax.Array | None = None
        for i, chunk in enumerate(self):
            result = function(chunk)
            if not self._pinned:
                result.copy_to_host_async()
            if flying is not None:
                self.chunks[i - 1] = keep(flying, pinned=self._pinned)
                jax.block_until_ready(self.chunks[i - 1])  # or the device would fill with results on their way out
            flying = result
        if flying is not None:
            self.chunks[-1] = keep(flying, pinned=self._pinned)

    def sample(self, tokens: int) -> list[jax.Array]:
        """Evenly spaced samples of up to `tokens` in all, at least one, on the device in chunks as large as these."""
        rows, length = sum(len(chunk) for chunk in self.chunks), self.chunks[0].shape[1]
        wanted = np.linspace(0, rows - 1, max(1, min(rows, tokens // length))).round().astype(np.int64)
        starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])
        chunk_of = np.searchsorted(starts, wanted, side="right") - 1
        picked = in_steps(
            lambda c: jnp.take(fetch(self.chunks[c]), wanted[chunk_of == c] - starts[c], axis=0), np.unique(chunk_of)
        )
        taken, size = jnp.concatenate(picked), len(self.chunks[0])
        return [taken[i : i + size] for i in range(0, len(taken), size)]
