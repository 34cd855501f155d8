"""The consumers' sums with block scales: each 128 of K is scaled as it is added to the float32 sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.scaled_matmul.config import SCALE_CHUNK
from pallas_kernels.scaled_matmul.multiply import WGMMA, Consumer, Work

Sums = tuple[Any, ...]  # side by side; the columns of each have one scale


class BlockSum:
    """The scaled sum of tile i, as parts side by side whose columns have one scale each; one part where wg_n allows."""

    def __init__(self, consumer: Consumer, i: Any, n0: Any) -> None:
        p, c = consumer.walk.p, consumer.walk.p.config
        self.consumer, self.i = consumer, i
        self.blocks = c.tile_k // 128  # of a K step
        self.last_column = -(-p.k // 128) - 1  # of w's scales
        last_row = -(-p.n // 128) - 1
        column0 = n0 + consumer.column
        self.w_row = lax.min(lax.div(column0, jnp.int32(128)), jnp.int32(last_row))
        self.straddles = p.w_kind == "block" and 128 % c.wg_n != 0  # columns of two scale blocks
        self.width = c.scale_columns() if self.straddles else c.wg_n
        self.starts = range(0, c.wg_n, self.width)
        self.next_row = lax.min(self.w_row + 1, jnp.int32(last_row))
        self.in_next = [lax.rem(column0, jnp.int32(128)) + start >= 128 for start in self.starts]

    def over(self, slot: Any, meanwhile: Sequence[Work] = ()) -> tuple[Sums, Any]:
        """All K steps, the first in `slot` -> (sums, the next tile's slot). `meanwhile`: see `Consumer.steps`."""
        p, c = self.consumer.walk.p, self.consumer.walk.p.config
        shape = (p.wg_rows, self.width)
        self.first_block = self.consumer.walk.first_step * self.blocks
        nothing = tuple(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA) for _ in self.starts)
        if c.overlap == 1:
            return self.consumer.steps(self._step, nothing, slot, meanwhile)
        return lax.fori_loop(0, p.k_steps // c.overlap, self._run, (nothing, slot))

    def _step(self, ki: Any, slot: Any, totals: Sums, work: Work | None = None) -> Sums:
        factors = self._factors(ki)
        self.consumer.await_full(slot)
        for j, part in enumerate(self.consumer.partial_sums(slot, self.blocks, 128, work)):
            totals = self._promote(totals, part, factors[j], self._chunk(ki), ki * self.blocks + j)
        self.consumer.release(slot)
        return totals

    def _run(self, first: Any, state: tuple[Sums, Any]) -> tuple[Sums, Any]:
        """`overlap` K steps: while one accumulator is promoted, the tensor cores fill the next."""
        totals, slot = state
        consumer, c = self.consumer, self.consumer.walk.p.config
        accumulator = plgpu.ACC(consumer.shape, consumer.walk.p.accumulator)

        def issue(acc, slot):
            consumer.await_full(slot)
            plgpu.wgmma(acc, *consumer.operands(slot, 0, 128))

        def fold(acc, ki, slot, totals, pending):
            factors = self._factors(ki)[0]
            part = plgpu.wgmma_accumulator_load(acc, wait_n=pending)
            consumer.release(slot)
            return self._promote(totals, part, factors, self._chunk(ki), ki)

        def rest(acc, j, slot, totals):
            """With `acc` (step j of the run) in flight: the sums after all of the run's steps."""
            ki = first * c.overlap + j
            if j == c.overlap - 1:
                return fold(acc, ki, slot, totals, 0)
            following = consumer.walk.advance(slot, 1)

            def next_step(next_acc):
                issue(next_acc, following)
                return rest(next_acc, j + 1, following, lax.optimization_barrier(fold(acc, ki, slot, totals, 1)))

            return pl.run_scoped(next_step, accumulator)

        def start(acc):
            issue(acc, slot)
            return rest(acc, 0, slot, totals)

        return pl.run_scoped(start, accumulator), consumer.walk.advance(slot, c.overlap % c.stages)

    def _factors(self, ki: Any) -> list[list[Any]]:
        """What a K step's promotions need of w's scales, by block and part; asked for before the operands are
        awaited. None where the epilogue applies them."""
        columns = [
            lax.min(self.first_block + ki * self.blocks + j, jnp.int32(self.last_column)) for j in range(self.blocks)
        ]
        return [self._w_factors(column) for column in columns]

    def _w_factors(self, column: Any) -> list[Any]:
        p, ws = self.consumer.walk.p, self.consumer.walk.refs["ws"]
        if p.w_kind != "block":
            return [None]
        here = ws[self.w_row, column]
        if not self.straddles:
            return [here]
        beyond = ws[self.next_row, column]
        return [jnp.where(after, beyond, here) for after in self.in_next]

    def _chunk(self, ki: Any) -> Any:
        return self.consumer.walk.chunk_slot(self.i, self.consumer.walk.chunk_of(ki)[0])

    def _promote(self, totals: Sums, part: Any, factors: list[Any], chunk: Any, block_column: Any) -> Sums:
        """totals + part * scales. chunk: where x's scales lie; block_column: which of them."""
        p, rows = self.consumer.walk.p, self.consumer.walk.p.wg_rows
        part = part.astype(jnp.float32)
        parts = [part[:, start : start + self.width] for start in self.starts] if self.straddles else [part]
        scales = factors
        if p.x_kind == "block":
            x_scale = plgpu.load(
                self.consumer.walk.scratch["xs_block"].at[
                    chunk, pl.ds(self.consumer.row, rows), lax.rem(block_column, jnp.int32(SCALE_CHUNK))
                ],
                layout=WGMMA.reduce(1),
                optimized=False,
            )
            shape = (rows, self.width)
            scales = [lax.broadcast_in_dim(x_scale if f is None else x_scale * f, shape, [0]) for f in factors]
        return tuple(t + q * s for t, q, s in zip(totals, parts, scales))
