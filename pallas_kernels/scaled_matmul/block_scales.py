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

Sums = tuple[
    Any, ...
]  # parts of a tile: from top to bottom, and side by side within; the columns of each have one scale


class BlockSum:
    """The scaled sum of tile i, as parts whose columns have one scale each.

    A warpgroup's `m_groups` x 64 rows are multiplied 64 at a time: two such sums fit into registers beside one partial
    sum, and while one half is promoted the tensor cores have the other warpgroup's half to multiply.
    """

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
        walk, c = self.consumer.walk, self.consumer.walk.p.config
        self.first_block = walk.first_step * self.blocks
        zero = lambda width: plgpu.layout_cast(jnp.zeros((64, width), jnp.float32), WGMMA)  # noqa: E731
        nothing = (zero(self.width),) * (c.m_groups * len(self.starts))
        if c.overlap > 1:
            return lax.fori_loop(0, walk.p.k_steps // c.overlap, self._run, (nothing, slot))
        accs = (zero(c.wg_n),) * self.blocks if c.overwrite else ()
        (totals, _), slot = self.consumer.steps(self._step, (nothing, accs), slot, meanwhile)
        if c.late_release:
            self.consumer.release(walk.before(slot))
        return totals, slot

    def _step(self, ki: Any, slot: Any, carry: tuple[Sums, Sums], work: Work | None = None) -> tuple[Sums, Sums]:
        c, across = self.consumer.walk.p.config, len(self.starts)
        totals, accs = carry
        done: list[Any] = []
        factors = self._factors(ki)
        self.consumer.await_full(slot)
        for group in range(c.m_groups):
            sums = totals[group * across : (group + 1) * across]

            def meanwhile(group=group):
                if c.late_release and group == 0:
                    before = self.consumer.walk.before(slot)
                    pl.when(ki > 0)(lambda: self.consumer.release(before))
                if work is not None and group == 0:
                    work()
                return [self._x_scales(ki, j, group) for j in range(self.blocks)]

            if c.overwrite:
                parts, x_scales = self.consumer.overwritten(slot, group, accs, meanwhile)
                accs = tuple(parts)
            else:
                parts, x_scales = self.consumer.partial_sums(slot, self.blocks, 128, meanwhile)
            if not c.late_release and group == c.m_groups - 1:
                self.consumer.release(slot)  # all products are done, and x's scales read: promoting needs neither
            for part, x_scale, w_scales in zip(parts, x_scales, factors):
                sums = self._promote(sums, part, x_scale, w_scales)
            done += lax.optimization_barrier(sums) if c.m_groups > 1 else sums
        return tuple(done), accs

    def _run(self, first: Any, state: tuple[Sums, Any]) -> tuple[Sums, Any]:
        """`overlap` K steps: while one accumulator is promoted, the tensor cores fill the next."""
        totals, slot = state
        consumer, c = self.consumer, self.consumer.walk.p.config
        accumulator = plgpu.ACC(consumer.shape, consumer.walk.p.accumulator)

        def issue(acc, slot):
            consumer.await_full(slot)
            plgpu.wgmma(acc, *consumer.operands(slot, 0, 128))

        def fold(acc, ki, slot, totals, pending):
            [factors], x_scale = self._factors(ki), self._x_scales(ki, 0, 0)
            part = plgpu.wgmma_accumulator_load(acc, wait_n=pending)
            consumer.release(slot)
            return self._promote(totals, part, x_scale, factors)

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

    def _x_scales(self, ki: Any, j: int, group: int) -> Any:
        """x's scales of block j of a K step, for 64 rows; None where the epilogue applies them. To be asked for before
        the products are awaited, which hides the shared memory's latency."""
        walk = self.consumer.walk
        if walk.p.x_kind != "block":
            return None
        chunk = walk.chunk_slot(self.i, walk.chunk_of(ki)[0])
        rows = pl.ds(self.consumer.row + 64 * group, 64)
        column = lax.rem(ki * self.blocks + j, jnp.int32(SCALE_CHUNK))
        return plgpu.load(walk.scratch["xs_block"].at[chunk, rows, column], layout=WGMMA.reduce(1), optimized=False)

    def _promote(self, totals: Sums, part: Any, x_scale: Any, w_scales: list[Any]) -> Sums:
        """totals + part * scales, for 64 rows."""
        part = part.astype(jnp.float32)
        parts = [part[:, start : start + self.width] for start in self.starts] if self.straddles else [part]
        scales = w_scales
        if x_scale is not None:
            products = [x_scale if w_scale is None else x_scale * w_scale for w_scale in w_scales]
            scales = [lax.broadcast_in_dim(product, (64, self.width), [0]) for product in products]
        return tuple(t + q * s for t, q, s in zip(totals, parts, scales))
