"""Which programs an engine has, and which of them a plan takes.

A step is either one program (`Fused`) or two: `Forward`, the model up to the logits, and `Draw`, the tokens. The model
is what costs a start its time: tracing and lowering it holds the interpreter's lock for one to three seconds a program,
however many cores compile. In two halves one forward program serves greedy, sampling, scored and constrained steps
alike, and a second of them is only what the bucket makes it; the price is one more launch, some 10 us of a step. Greedy
decoding, where a step may take 2 ms, has fused programs as well; and so have dispatches of several steps, whose tokens
never leave the device.

With masks a forward program can only be handed over when the tokens before it have been read and their masks made, and
handing one over costs the host 2.5 ms, in which the device waits. So steps with masks have it cut once more where the
device's launches cost (`Begin`, then the rest): the rest is handed over while the first layers are computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from jqserve.engine.batch import tiles_needed
from jqserve.engine.buckets import Bucket, Buckets
from jqserve.engine.plan import Plan
from jqserve.engine.variant import ORDER, Variant, needed_by


@dataclasses.dataclass(frozen=True)
class Fused:
    """Decode steps with their sampling: `engine/step.run_step`."""

    bucket: Bucket
    variant: Variant

    @property
    def name(self) -> str:
        return f"step_{self.bucket.decode_rows}_{self.bucket.steps}_{self.variant}"


@dataclasses.dataclass(frozen=True)
class Forward:
    """The first half, `engine/split.forward`, which gives the logits of `asked` rows. `scored`: the log-probability of
    every token of the prompts as well. `begun`: only the layers behind those of `Begin`."""

    bucket: Bucket
    asked: int
    scored: bool = False
    begun: bool = False

    @property
    def name(self) -> str:
        kind = "_scored" * self.scored + "_begun" * self.begun
        return f"forward_{self.bucket.decode_rows}_{self.bucket.tiles}_{self.asked}{kind}"


@dataclasses.dataclass(frozen=True)
class Begin:
    """The first layers of a step without prefill, `engine/split.begin`."""

    bucket: Bucket

    @property
    def name(self) -> str:
        return f"begin_{self.bucket.decode_rows}"


@dataclasses.dataclass(frozen=True)
class Draw:
    """The second half, `engine/split.draw`, for so many rows of logits."""

    rows: int
    variant: Variant
    masked: bool = False

    @property
    def name(self) -> str:
        return f"draw_{self.rows}_{self.variant}{'_masked' * self.masked}"


Program = Fused | Begin | Forward | Draw


def captured(program: Program) -> bool:
    """Whether it runs from command buffers. Not where prompts are alone, whose first token waits: a captured step
    begins on the device when all of it has been handed over, any other when its first kernel has."""
    return not (isinstance(program, Forward) and program.bucket.tiles and not program.bucket.decode_rows)


def describe(program: Program) -> str:
    """For a progress bar."""
    if isinstance(program, Draw):
        return f"{program.variant} from {program.rows} rows{' with masks' * program.masked}"
    bucket = program.bucket
    if isinstance(program, Fused):
        return f"{bucket.decode_rows} rows, {bucket.steps} steps, {program.variant}"
    if isinstance(program, Begin):
        return f"{bucket.decode_rows} rows, first layers"
    kind = ", scored" * program.scored + ", last layers" * program.begun
    return f"{bucket.decode_rows} rows + {bucket.tiles} tiles{kind}"


class Programs:
    """Those of one engine."""

    def __init__(
        self, buckets: Buckets, tile_size: int, variants: tuple[Variant, ...], *, cut_masked: bool = False
    ) -> None:
        """`variants`: the samplers to have programs of; a step takes the first that gives all it asks. `cut_masked`:
        decode steps with masks have their first layers in a program of their own."""
        self.buckets, self.tile_size, self.variants = buckets, tile_size, variants
        self.cut_masked = cut_masked

    def always(self) -> list[Program]:
        """All that an ordinary request can need, the costliest to compile first."""
        buckets = self.buckets
        forwards = [self._forward(b) for b in buckets.mixed] + [self._forward(Bucket(n, 0)) for n in self._coarse()]
        fused = [Fused(bucket, v) for v in self.variants for bucket in self._fused(v)]
        models: list[Fused | Forward] = [*forwards, *fused]
        models.sort(key=lambda p: (-p.bucket.rows(self.tile_size), -p.bucket.steps, p.name))
        draws = [Draw(rows, v) for rows, v in self._draws(forwards)]
        return [*models, *draws]

    def on_demand(self) -> list[Program]:
        """Those of constrained requests and of scored prompts. Prompts are scored in steps of all rows."""
        rows = self.buckets.decode[-1]
        scored = [self._forward(b, scored=True) for b in sorted(self.buckets.mixed, reverse=True)]
        if Variant.GREEDY not in self.variants:
            scored = scored[:1]  # where every program is on the user's clock (CPUs): the largest
        forwards = [*(f for f in self.always() if isinstance(f, Forward)), *scored]
        masked = [Draw(asked, v, True) for asked, v in self._draws(forwards) if v is not Variant.GREEDY]
        cut: list[Program] = []
        for bucket in (Bucket(n, 0) for n in self._coarse() if self.cut_masked):
            cut += [Begin(bucket), self._forward(bucket, begun=True)]
        return [*(f for f in scored if f.bucket.decode_rows == rows), *cut, *masked]

    def fused(self, plan: Plan) -> Fused | None:
        """The one program of a plan; None: it runs in halves."""
        if plan.chunks or plan.constrained:
            return None
        needed = needed_by(plan.sequences)
        if plan.steps == 1 and self.variant(needed) is not Variant.GREEDY:
            return None
        if needed is Variant.PLAIN:  # a model once more to compile, for a saving that few rows hardly notice
            needed = Variant.SAMPLE
        variant = self.variant(needed)
        coarse = variant is not Variant.GREEDY
        bucket = self.buckets.choose(len(plan.decodes), 0, self.tile_size, steps=plan.steps, coarse=coarse)
        return Fused(bucket, variant)

    def forward(self, plan: Plan) -> Forward:
        """The first half of a plan: the one with the fewest rows that holds it."""
        tiles, scored = tiles_needed(plan, self.tile_size), any(chunk.sequence.wants_scores for chunk in plan.chunks)
        if not scored:
            bucket = self.buckets.choose(len(plan.decodes), tiles, self.tile_size, coarse=True)
            return self._forward(bucket, begun=self.cut_masked and plan.constrained and not tiles)
        fitting = [p for p in self.on_demand() if isinstance(p, Forward) and p.bucket.tiles >= tiles]
        return min(fitting, key=lambda p: p.bucket.rows(self.tile_size))

    def draw(self, plan: Plan, forward: Forward, masked: bool) -> Draw:
        """The second half of a plan whose first is `forward`."""
        needed = needed_by(plan.sequences)
        if needed is Variant.GREEDY and (masked or not forward.bucket.tiles):
            needed = Variant.PLAIN
        return Draw(forward.asked, self.variant(needed), masked)

    def variant(self, needed: Variant) -> Variant:
        """The least of ours that does as much."""
        return next(v for v in self.variants if ORDER.index(v) >= ORDER.index(needed))

    def cheapest(self, bucket: Bucket) -> tuple[Program, ...]:
        """What a step of this bucket takes in which everybody is greedy: one program, or two."""
        if not bucket.tiles and (bucket.steps > 1 or Variant.GREEDY in self.variants):
            return (Fused(bucket, self.variants[0]),)
        forward = self._forward(bucket)
        return forward, Draw(forward.asked, self.variants[0])

    def full_step(self, tiles: int) -> tuple[Program, ...]:
        """The cheapest step in which everybody decodes beside so many tiles."""
        return self.cheapest(self.buckets.choose(self.buckets.decode[-1], tiles, self.tile_size))

    def _forward(self, bucket: Bucket, scored: bool = False, begun: bool = False) -> Forward:
        """All steps with prefill of the same decode rows draw from as many logits, for a row more of them costs
        nothing beside reading the head, and a draw program of its own would cost a start."""
        tiles = max((b.tiles for b in self.buckets.mixed if b.decode_rows == bucket.decode_rows), default=0)
        return Forward(bucket, bucket.decode_rows + (tiles if bucket.tiles else 0), scored, begun)

    def _coarse(self) -> tuple[int, ...]:
        return self.buckets.coarse or self.buckets.decode

    def _fused(self, variant: Variant) -> list[Bucket]:
        if variant is Variant.PLAIN:
            return []
        greedy = variant is Variant.GREEDY
        rows = self.buckets.decode if greedy else self._coarse()
        return [Bucket(n, 0, k) for n in rows for k in self.buckets.steps_of(n) if greedy or k > 1]

    def _draws(self, forwards: Iterable[Forward]) -> list[tuple[int, Variant]]:
        kinds = {(f.asked, v) for f in forwards for v in self.variants if f.bucket.tiles or v is not Variant.GREEDY}
        return sorted(kinds, key=lambda kind: (-kind[0], ORDER.index(kind[1])))
