"""The residual stream of all calibration samples, on the host in chunks; the device holds one chunk, and the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

#: Tokens on the device at a time.
CHUNK_TOKENS = 16384


class Activations:
    """Chunks [B, S, D] of samples, in order. The order never changes, so sums over chunks are the same in every run."""

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self.chunks = list(chunks)

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
        """Chunks on the device, one sent ahead."""
        waiting = None
        for chunk in self.chunks:
            ready, waiting = waiting, jax.device_put(chunk)
            if ready is not None:
                yield ready
        if waiting is not None:
            yield waiting

    def map(self, function: Callable[..., jax.Array], *others: Activations) -> Activations:
        """function(chunk, the same chunk of the others...) of every chunk; what comes back is on the host."""
        results: list[np.ndarray] = []
        flying: Any = None
        for arrays in zip(self, *others):
            result = function(*arrays)
            result.copy_to_host_async()
            if flying is not None:
                results.append(np.asarray(flying))
            flying = result
        return Activations([*results, *([] if flying is None else [np.asarray(flying)])])

    def sample(self, tokens: int) -> list[np.ndarray]:
        """Evenly spaced samples of up to `tokens` in all, at least one, in chunks as large as the others."""
        rows, length = sum(len(chunk) for chunk in self.chunks), self.chunks[0].shape[1]
        wanted = np.linspace(0, rows - 1, max(1, min(rows, tokens // length))).round().astype(np.int64)
        starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])
        chunk_of = np.searchsorted(starts, wanted, side="right") - 1
        taken = np.stack([self.chunks[c][row - starts[c]] for c, row in zip(chunk_of, wanted)])
        size = len(self.chunks[0])
        return [taken[i : i + size] for i in range(0, len(taken), size)]
