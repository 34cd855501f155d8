"""From a loaded model to an engine: sizes chosen from the model and the device, everything put together."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jqserve.engine.batch import StepShape
from jqserve.engine.buckets import Buckets, make_buckets
from jqserve.engine.budget import Budget, chunk
from jqserve.engine.cache import CacheShape, cache_shape, kv_dtype, kv_source, pages_that_fit, round_pages, slow_pages
from jqserve.engine.compile_cache import ProgramCache, environment_facts, remembered
from jqserve.engine.config import EngineConfig, decode_steps, defaults_for, prefill_tiles, wanted_context
from jqserve.engine.engine import EngineCore
from jqserve.engine.lowering import Job
from jqserve.engine.measure import far, step_seconds, typical_context
from jqserve.engine.pages import PagePool
from jqserve.engine.places import places
from jqserve.engine.programs import Draw, Forward, Programs
from jqserve.engine.runner import Runner
from jqserve.engine.scheduler import Scheduler
from jqserve.engine.slots import empty
from jqserve.engine.split import draw_program, forward_program
from jqserve.engine.step import Structure, make_state
from jqserve.engine.traceable import Traceable, alone
from jqserve.engine.validate import Limits
from jqserve.engine.variant import ORDER, Variant
from jqserve.errors import UnsupportedError
from jqserve.models.build import build, split
from jqserve.models.config import ModelConfig
from jqserve.ops.compiler_options import compiler_options
from jqserve.ops.device import current_device

log = logging.getLogger(__name__)

CPU_POOL_BYTES = 512 * 2**20


def assemble(
    config: EngineConfig,
    model: ModelConfig,
    params: Mapping[str, Any],
    *,
    info: dict[str, Any] | None = None,
    programs: Path | None = None,
) -> EngineCore:
    """An engine over `params` (in kernel layout, on the device), not warmed up yet. `programs`: where compiled programs
    are kept, or None.

    Raises UnsupportedError for options that contradict each other or the model, JqserveError when no memory is left.
    """
    structure, leaves = split(build(model, params))
    device = next(iter(leaves[0].devices()))
    defaults = defaults_for(device.platform)
    slots = config.max_running_requests or defaults.max_running_requests
    tile_size = config.tile_size or defaults.tile_size
    tiles = prefill_tiles(config.chunked_prefill_size or defaults.chunked_prefill_size, tile_size)
    steps, steps_rows = decode_steps(config.num_continuous_decode_steps, defaults)
    buckets = make_buckets(slots, tiles, fine=defaults.fine_buckets, steps=steps, steps_rows=steps_rows)
    page_size = config.page_size or defaults.page_size
    scaled = "k_scale" in params["layers"]["0"]["attn"]
    dtype = kv_dtype(config.kv_dtype, str(params["embed"]["weight"].dtype), scaled)
    context = wanted_context(config, model, device.platform)
    smallest = cache_shape(model, page_size=page_size, pages=1, dtype=dtype)
    if (slow := slow_pages(smallest, current_device())) is not None:
        log.warning("%s", slow)
    shape = StepShape(slots, page_size, -(-context // page_size), tile_size, model.vocab_size)
    pages = config.num_pages or _choose_pages(
        config, structure, leaves, model, shape, smallest, buckets, defaults.variants, programs
    )
    cache = dataclasses.replace(smallest, pages=pages + 1)
    if cache.tokens < context:
        context = _shortened(config, context, cache)
        shape = dataclasses.replace(shape, pages_per_sequence=-(-context // page_size))
    limits = Limits(model.vocab_size, context, model.eos_token_ids)
    kept = None
    if programs is not None:
        kept = ProgramCache(
            programs, environment_facts(device) | _program_facts(structure, leaves, model, shape, cache)
        )
    runner = Runner(
        structure,
        leaves,
        shape,
        cache,
        buckets,
        variants=defaults.variants,
        cut_masked=defaults.cut_masked,
        cache_of_programs=kept,
        job=None if device.platform == "cpu" else Job.of(model, params, shape, cache, current_device()),
    )
    scheduler = Scheduler(
        PagePool(pages),
        page_size=page_size,
        slots=slots,
        tile_size=tile_size,
        tiles=tiles,
        steps=steps,
        steps_rows=steps_rows,
        mixed=not config.disable_mixed_chunk,
        prefix_cache=not config.disable_radix_cache,
        conservativeness=config.schedule_conservativeness,
        fill=buckets.fill,
    )
    facts = _facts(config, model, context, slots, steps, cache, device) | (info or {})
    if source := kv_source(dtype, scaled):
        log.info("KV cache in %s: %s", dtype, source)
        facts["kv"]["scales"] = source
    overlap = not config.disable_overlap_schedule
    return EngineCore(runner, scheduler, limits, max_queued=config.max_queued, overlap=overlap, info=facts)


def warmup_runs(engine: EngineCore) -> int:
    return defaults_for(engine.runner.device.platform).warmup_runs


def choose_budget(engine: EngineCore) -> dict[str, float]:
    """After the warm-up: sets the tiles of a step in which others decode, by steps at a typical context and how far
    into their prompts those are, and of a step of prompts alone. Returns the seconds by step, measured."""
    runner, scheduler = engine.runner, engine.scheduler
    rows, context = runner.buckets.decode[-1], typical_context(runner)
    measured = {tiles: step_seconds(runner, tiles, context) for tiles in runner.buckets.tile_counts(rows)}
    decode = step_seconds(runner, 0, context)
    first = Budget(measured, decode).tiles()
    deep, behind, before = {}, 0.0, far(runner, first)
    if before:
        seconds = step_seconds(runner, first, context, before)
        deep = {f"{rows}+{first} behind {before}": seconds}
        behind = max(0.0, seconds - measured[first]) / (first * before)
    budget = Budget(measured, decode, behind)
    scheduler.decode_tiles = min(scheduler.tiles, first)
    scheduler.tiles_behind = budget.tiles
    counts = runner.buckets.tile_counts(0)
    alone = {tiles: step_seconds(runner, tiles, context, alone=True) for tiles in counts}
    scheduler.tiles = min(scheduler.tiles, chunk(alone))
    log.info(
        "a decode step behind %d tokens takes %.1f ms; %d prefill tiles beside it, %d without",
        context, decode * 1e3, scheduler.decode_tiles, scheduler.tiles,
    )  # fmt: skip
    steps = {f"{rows}+{tiles}": seconds for tiles, seconds in {0: decode, **measured}.items()} | deep
    steps |= {f"0+{tiles}": seconds for tiles, seconds in alone.items()}
    return {step: round(seconds, 6) for step, seconds in steps.items()}


def _shortened(config: EngineConfig, context: int, cache: CacheShape) -> int:
    """A single request must fit into the pool, or it could never end."""
    if config.context_length is not None:
        raise UnsupportedError(
            f"the KV pool holds {cache.tokens} tokens, fewer than one request of context_length {context} may need; "
            "lower --context-length, or give more memory (--mem-fraction-static, num_pages)"
        )
    log.warning("context length %d is lowered to %d, what the KV pool holds", context, cache.tokens)
    return cache.tokens


def _choose_pages(
    config: EngineConfig,
    structure: Structure,
    leaves: tuple[jax.Array, ...],
    model: ModelConfig,
    shape: StepShape,
    smallest: CacheShape,
    buckets: Buckets,
    variants: tuple[Variant, ...],
    programs: Path | None,
) -> int:
    """Usable pages: on a CPU a fixed budget, on a GPU what weights and the worst step's activations leave."""
    device = next(iter(leaves[0].devices()))
    most = shape.slots * shape.pages_per_sequence
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return max(1, min(most, CPU_POOL_BYTES // smallest.page_bytes))
    trial = dataclasses.replace(smallest, pages=shape.slots + 1)
    state = jax.eval_shape(lambda: make_state(shape))
    programs_of = Programs(buckets, shape.tile_size, variants).always()
    forward = max((p for p in programs_of if isinstance(p, Forward)), key=lambda p: p.bucket.rows(shape.tile_size))
    draw = max((p for p in programs_of if isinstance(p, Draw)), key=lambda p: (p.rows, ORDER.index(p.variant)))
    logits = 2 * draw.rows * shape.vocab_size * 4  # those of the step before may still be there

    def temporary_of(one: Traceable) -> int:
        analysis = alone(one.lower).compile(compiler_options()).memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis is not None else 2**30

    def measure() -> int:
        """The two take turns. Compiled at once, for XLA compiles without the interpreter's lock."""
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), leaves)
        params, kv = empty(shape.slots), trial.abstract()
        with concurrent.futures.ThreadPoolExecutor(2, "measure") as pool:
            first = pool.submit(
                lambda: temporary_of(forward_program(structure, shape, forward, weights, kv, state, params))
            )
            second = pool.submit(lambda: temporary_of(draw_program(shape, draw, state, params)))
            return max(first.result(), second.result())

    facts = environment_facts(device) | _program_facts(structure, leaves, model, shape, trial)
    temporary = remembered(programs, facts | {"programs": [forward.name, draw.name]}, measure) + logits
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    limit = int(stats["bytes_limit"])
    pages = pages_that_fit(
        page_bytes=smallest.page_bytes,
        limit=limit,
        in_use=int(stats["bytes_in_use"]) + state_bytes,
        static_bytes=int(limit / config.xla_fraction * config.mem_fraction_static),
        # a tenth for fragmentation, 256 MiB for outputs and libraries
        activation_bytes=int(1.1 * temporary) + 2**28 + sum(places(limit)),
        most=most,
    )
    pages = round_pages(pages)
    log.info("the worst step takes %.2f GiB beside weights and pages; %d pages", temporary / 2**30, pages)
    return pages


def _program_facts(
    structure: Any, leaves: tuple[jax.Array, ...], model: ModelConfig, shape: StepShape, cache: CacheShape
) -> dict[str, Any]:
    """What of the model goes into its step programs: all but the values of its weights."""
    return {
        "model": model.to_json(),
        "tree": str(structure.treedef),
        "leaves": [f"{x.dtype}{list(x.shape)}" for x in leaves],
        "shape": dataclasses.asdict(shape),
        "cache": dataclasses.asdict(cache),
    }


def _facts(
    config: EngineConfig, model: ModelConfig, context: int, slots: int, steps: int, cache: CacheShape, device: Any
) -> dict[str, Any]:
    return {
        "model_path": config.model_path,
        "architecture": model.architecture,
        "model_type": model.model_type,
        "vocab_size": model.vocab_size,
        "context_length": context,
        "max_running_requests": slots,
        "max_queued": config.max_queued,
        "eos_token_ids": list(model.eos_token_ids),
        "model": model.to_json(),
        "kv": {
            "dtype": cache.dtype,
            "page_size": cache.page_size,
            "pages": cache.pages - 1,
            "bytes": cache.pages * cache.page_bytes,
            "tokens": cache.tokens,
        },
        "device": f"{device.platform}: {device.device_kind}",
        "overlap_schedule": not config.disable_overlap_schedule,
        "mixed_chunk": not config.disable_mixed_chunk,
        "prefix_cache": not config.disable_radix_cache,
        "continuous_decode_steps": steps,
    }
