"""The consumers' sums over K: wgmma on the stages as they fill."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu

from pallas_kernels.scaled_matmul import product
from pallas_kernels.scaled_matmul.walk import Walk

WGMMA = plgpu.Layout.WGMMA
Work = Callable[[], None]  # done while the tensor cores multiply


class Consumer:
    """One consumer warpgroup: which rows and columns of a tile are its own, and which K steps or tiles."""

    def __init__(self, walk: Walk) -> None:
        self.walk, c = walk, walk.p.config
        self.owner = lax.rem(walk.wg, jnp.int32(walk.p.owners))  # place in the output tile
        group = lax.div(walk.wg, jnp.int32(walk.p.owners))
        self.wg_k: Any = jnp.int32(0) if c.teams > 1 else group  # never both
        self.team: Any = group if c.teams > 1 else jnp.int32(0)
        self.wg_m = lax.div(self.owner, jnp.int32(c.wgs_n))
        self.wg_n = lax.rem(self.owner, jnp.int32(c.wgs_n))
        self.shape = (walk.p.wg_rows, c.wg_n)

    @property
    def row(self) -> Any:
        """First row of its part of a tile."""
        return self.wg_m * self.walk.p.wg_rows

    @property
    def column(self) -> Any:
        return self.wg_n * self.walk.p.config.wg_n

    def operands(self, slot: Any, k0: int, length: int, row: int = 0, rows: int = 0) -> tuple[Any, Any]:
        """`length` of K of its rows of x (or of `rows` of them, from `row` on) and of its columns of w, in a stage."""
        k_slice = pl.ds(k0, length)
        x = self.walk.x_rows(slot, self.row + row, rows or self.shape[0]).at[:, k_slice]
        columns = self.walk.w_rows(slot, self.column, self.shape[1]).at[:, k_slice]
        return x, columns.transpose((1, 0))

    def await_full(self, slot: Any) -> None:
        plgpu.barrier_wait(self.walk.full(self.team, slot))

    def release(self, slot: Any) -> None:
        p = self.walk.p
        if p.one_arrival:
            # A few threads of a warpgroup arrive for all of it: the other warps must be done with the slot too.
            # The lighter barrier has not been compared on a GPU yet: pairs of blocks keep the other without the option.
            light = p.config.one_arrival and not p.interpretable
            _await_warps() if light else plgpu.commit_smem()
        plgpu.barrier_arrive(self.walk.scratch["empty"].at[slot])

    def partial_sums(
        self, slot: Any, parts: int, length: int, meanwhile: Callable[[], Any] = lambda: ()
    ) -> tuple[list[Any], Any]:
        """`parts` sums over `length` of K each, all issued before the first is awaited, and `meanwhile`'s result."""

        def multiply(*accs):
            for j, acc in enumerate(accs):
                plgpu.wgmma(acc, *self.operands(slot, j * length, length))
            self.pass_turn()
            found = meanwhile()
            return [plgpu.wgmma_accumulator_load(acc, wait_n=parts - 1 - j) for j, acc in enumerate(accs)], found

        self.await_turn()
        return pl.run_scoped(multiply, *[plgpu.ACC(self.shape, self.walk.p.accumulator)] * parts)

    def overwritten(
        self, slot: Any, group: int, accs: Sequence[Any], meanwhile: Callable[[], Any]
    ) -> tuple[list[Any], Any]:
        """The same for 64 of its rows and 128 of K in each of `accs`, whose registers take the sums (see `product`)."""
        p, operands = self.walk.p, self.walk.scratch["operands"]
        x_row, w_row = self.walk.x_start(slot) + self.row + 64 * group, self.walk.w_start(slot) + self.column
        self.await_turn()
        if p.interpretable:

            def multiply(acc, j):
                plgpu.wgmma(acc, *self.operands(slot, 128 * j, 128, 64 * group, 64))
                return acc[...]

            acc = plgpu.ACC((64, self.shape[1]))
            sums = [pl.run_scoped(functools.partial(multiply, j=j), acc) for j in range(len(accs))]
            self.pass_turn()
            return sums, meanwhile()
        issued = [product.multiply(acc, operands, x_row, w_row, 128 * j, p.config.tile_k) for j, acc in enumerate(accs)]
        self.pass_turn()
        found = meanwhile()
        return [product.wait(acc, len(issued) - 1 - j) for j, acc in enumerate(issued)], found

    def await_turn(self) -> None:
        if self.walk.p.config.turns:
            plgpu.barrier_wait(self.walk.scratch["turn"].at[self.owner])

    def pass_turn(self) -> None:
        if self.walk.p.config.turns:
            plgpu.barrier_arrive(self.walk.scratch["turn"].at[1 - self.owner])

    def steps(self, body: Callable[..., Any], init: Any, slot: Any, meanwhile: Sequence[Work] = ()) -> tuple[Any, Any]:
        """Folds `body(ki, slot, carry)` over the K steps of its group -> (carry, the next tile's slot).

        The first steps are told what else to do while they multiply: `body(ki, slot, carry, work)`.
        """
        p, c, advance = self.walk.p, self.walk.p.config, self.walk.advance
        if c.wgs_k == 1:
            for ki, work in enumerate(meanwhile):
                init, slot = body(jnp.int32(ki), slot, init, work), advance(slot, 1)
            step = lambda ki, s: (body(ki, s[1], s[0]), advance(s[1], 1))  # noqa: E731
            return lax.fori_loop(len(meanwhile), p.k_steps, step, (init, slot))

        def mine(j, state):
            carry, slot = state
            return body(j * c.wgs_k + self.wg_k, slot, carry), advance(slot, c.wgs_k)

        count = lax.div(jnp.int32(p.k_steps - 1) - self.wg_k, jnp.int32(c.wgs_k)) + 1
        carry, _ = lax.fori_loop(0, count, mine, (init, advance(slot, self.wg_k)))
        return carry, advance(slot, p.k_steps % c.stages)


def _await_warps() -> None:
    """The four warps of a warpgroup meet. `commit_smem` would also wait until what they wrote is seen by copies: they
    have read only."""

    @plgpu.inline_mgpu(arg_types=())
    def meet(ctx: Any) -> None:
        del ctx
        mgpu.warpgroup_barrier()

    meet()


def plain_sum(consumer: Consumer, slot: Any, meanwhile: Sequence[Work] = ()) -> tuple[Any, Any]:
    """The sum in the tensor cores' accumulator from end to end -> (sum, the next tile's slot)."""

    def scope(acc):
        def step(ki, slot, previous, work=None):
            consumer.await_full(slot)
            plgpu.wgmma(acc, *consumer.operands(slot, 0, consumer.walk.p.config.tile_k))
            if work is not None:
                work()
            plgpu.wgmma_wait(1)

            @pl.when(previous >= 0)
            def _():
                consumer.release(previous)

            return slot

        last, slot_after = consumer.steps(step, jnp.int32(-1), slot, meanwhile)
        total = acc[...]
        consumer.release(last)
        return total, slot_after

    return pl.run_scoped(scope, plgpu.ACC(consumer.shape, consumer.walk.p.accumulator))


def promoted_sum(consumer: Consumer, slot: Any) -> tuple[Any, Any]:
    """Each K step's sum added to a float32 one in registers -> (sum, the next tile's slot)."""

    def step(ki, slot, total):
        consumer.await_full(slot)
        [part], _ = consumer.partial_sums(slot, 1, consumer.walk.p.config.tile_k)
        consumer.release(slot)
        return total + part

    zero = plgpu.layout_cast(jnp.zeros(consumer.shape, consumer.walk.p.accumulator), WGMMA)
    return consumer.steps(step, zero, slot)
