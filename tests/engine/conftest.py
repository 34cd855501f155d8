"""A tiny random Llama and one compiled runner for it; tests put engines of many kinds around that runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from jqserve.engine.request import EngineRequest, FinishReason, SamplingParams, StepEvent
from jqserve.models.config import ModelConfig, RopeConfig

VOCAB = 61
EOS = 2
PAGE = 8
TILE = 16
TILES = 2
SLOTS = 16
CONTEXT = 128
STEPS = 5  # decode steps of a dispatch, where a test asks for several


def tiny_model() -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope=RopeConfig(),
        max_position=256,
        tied_embeddings=True,
        sliding_windows=(20, None),  # one layer of each kind: prefixes are found behind a window too
        dtype="float32",
        eos_token_ids=(EOS,),
    )


def tiny_params(model: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Large weights, so that margins between logits are far above the rounding of float32."""
    import jax.numpy as jnp

    random = np.random.default_rng(seed)

    def weight(*shape: int, scale: float = 2.0) -> Any:
        return jnp.asarray(random.normal(size=shape) * scale / np.sqrt(shape[-1]), jnp.float32)

    d, f, heads, kv = model.hidden_size, model.ffn_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    ones = jnp.ones((d,), jnp.float32)

    def layer() -> dict[str, Any]:
        return {
            "attn_norm": {"weight": ones},
            "attn": {"qkv": {"weight": weight(heads + 2 * kv, d)}, "o": {"weight": weight(d, heads)}},
            "mlp_norm": {"weight": ones},
            "mlp": {"gate_up": {"weight": weight(2 * f, d)}, "down": {"weight": weight(d, f)}},
        }

    return {
        "embed": {"weight": weight(model.vocab_size, d, scale=3.0)},
        "layers": {str(i): layer() for i in range(model.layers)},
        "final_norm": {"weight": ones},
    }


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    return tiny_model()


@pytest.fixture(scope="session")
def params(model: ModelConfig) -> dict[str, Any]:
    return tiny_params(model)


@pytest.fixture(scope="session")
def runner(model: ModelConfig, params: dict[str, Any]) -> Any:
    """Three programs (16 rows, 1 and 5 steps; 16 rows and 2 tiles), compiled once a session.

    Room for 16 sequences of 128 tokens.
    """
    from jqserve.engine.batch import StepShape
    from jqserve.engine.buckets import Bucket, Buckets
    from jqserve.engine.cache import cache_shape
    from jqserve.engine.runner import Runner
    from jqserve.engine.variant import Variant
    from jqserve.models.build import build, split

    structure, leaves = split(build(model, params))
    shape = StepShape(SLOTS, PAGE, CONTEXT // PAGE, TILE, VOCAB)
    cache = cache_shape(model, page_size=PAGE, pages=SLOTS * CONTEXT // PAGE, dtype="float32")
    buckets = Buckets((SLOTS,), (Bucket(SLOTS, TILES),), STEPS)
    runner = Runner(structure, leaves, shape, cache, buckets, variants=(Variant.SCORED,))
    runner.warm_up()
    return runner


MakeCore = Callable[..., Any]


@pytest.fixture(scope="session")
def make_core(runner: Any) -> MakeCore:
    """make_core(pages=, slots=, overlap=, max_queued=, tiles=, steps=, ...): an engine over the shared runner, or
    another `runner`."""
    from jqserve.engine.engine import EngineCore
    from jqserve.engine.pages import PagePool
    from jqserve.engine.scheduler import Scheduler
    from jqserve.engine.validate import Limits

    def make(
        *,
        pages: int = 256,
        slots: int = SLOTS,
        overlap: bool = True,
        max_queued: int = 1000,
        tiles: int = TILES,
        runner: Any = runner,
        **scheduling: Any,
    ) -> EngineCore:
        scheduler = Scheduler(PagePool(pages), page_size=PAGE, slots=slots, tile_size=TILE, tiles=tiles, **scheduling)
        limits = Limits(VOCAB, min(CONTEXT, pages * PAGE), (EOS,))
        return EngineCore(runner, scheduler, limits, max_queued=max_queued, overlap=overlap)

    return make


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng([seed, length]).integers(3, VOCAB, length))


def request(rid: int, ids: Sequence[int] | int, **sampling: Any) -> EngineRequest:
    """`ids`: the prompt, or its length. Greedy unless said otherwise."""
    ids = prompt(ids, rid) if isinstance(ids, int) else tuple(ids)
    return EngineRequest(rid, ids, SamplingParams(**({"temperature": 0.0, "max_new_tokens": 16} | sampling)))


class Outcome:
    """What the events of one request add up to."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[Any] = []
        self.finish: FinishReason | None = None
        self.matched: int | None = None
        self.error = ""

    def take(self, event: StepEvent) -> None:
        assert self.finish is None, f"an event after the end: {event}"
        self.tokens += event.token_ids
        self.logprobs += event.logprobs
        self.finish, self.matched, self.error = event.finish, event.matched_stop, event.error


def drain(core: Any, outcomes: dict[int, Outcome] | None = None, most: int = 5000) -> dict[int, Outcome]:
    outcomes = {} if outcomes is None else outcomes
    for _ in range(most):
        if not core.has_work():
            assert_all_free(core)
            return outcomes
        for event in core.step():
            outcomes.setdefault(event.rid, Outcome()).take(event)
    raise AssertionError(f"still working after {most} steps: {core.stats()}")


def complete(core: Any, requests: Iterable[EngineRequest]) -> dict[int, Outcome]:
    for one in requests:
        core.add(one)
    return drain(core)


def assert_all_free(core: Any) -> None:
    scheduler = core.scheduler
    assert not scheduler.running and not scheduler.waiting and not scheduler.suspects
    assert scheduler.pool.used == 0
    assert len(set(scheduler.free_slots)) == len(scheduler.free_slots)
