"""From `EngineConfig` to an engine: read the checkpoint, bring it into kernel layout, size the pool, warm up."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jqserve.checkpoint.asked import is_alias
from jqserve.checkpoint.convert import LoadedCheckpoint
from jqserve.checkpoint.convert import load as load_checkpoint
from jqserve.checkpoint.forecast import Forecast, Foretell
from jqserve.checkpoint.hub import resolve
from jqserve.checkpoint.open import is_store, open_checkpoint
from jqserve.checkpoint.opening import read_configs
from jqserve.checkpoint.plan import LoadPlan
from jqserve.engine.assemble import assemble, choose_budget, warmup_runs
from jqserve.engine.buckets import make_buckets
from jqserve.engine.cache import kv_dtype
from jqserve.engine.calibrated import open_asked
from jqserve.engine.compile_cache import (
    ProgramCache,
    choose_folder,
    compile_program,
    environment_facts,
    use_jax_cache,
)
from jqserve.engine.config import NO_COMMAND_BUFFERS, EngineConfig, defaults_for, wanted_context
from jqserve.engine.constraint import KINDS
from jqserve.engine.defaults import sampling_defaults
from jqserve.engine.engine import EngineCore
from jqserve.engine.grammar import Grammars, why_not
from jqserve.engine.kernel_plan import with_kernels
from jqserve.engine.places import hold_places
from jqserve.engine.remarks import before_loading
from jqserve.engine.totals import lines, measured, peaks
from jqserve.engine.traceable import alone
from jqserve.errors import JqserveError, UnsupportedError
from jqserve.models.build import quantized_weights
from jqserve.models.config import ModelConfig
from jqserve.ops.device import current_device
from jqserve.ops.relayout import relayout_leaf
from jqserve.ops.selftest import self_test, worth_testing
from jqserve.quant import QuantizedTensor

log = logging.getLogger(__name__)

#: (stage, text, detail): stage is "forecast" | "load" | "plan" | "cache" | "compile", text is for people, detail JSON
Report = Callable[[str, str, dict[str, Any]], None]


def load_engine(config: EngineConfig, report: Report | None = None) -> EngineCore:
    """An engine that is ready to serve. Raises JqserveError for what the user can mend."""
    if config.disable_cuda_graph and NO_COMMAND_BUFFERS not in os.environ.get("XLA_FLAGS", "").split():
        raise UnsupportedError(
            "disable_cuda_graph has no effect here: XLA reads it from XLA_FLAGS when a process first uses it, and only "
            f"the engine's own process sets that. Start this program with XLA_FLAGS={NO_COMMAND_BUFFERS}, or serve "
            "with jqserve-server --frontend process"
        )
    kv_dtype(config.kv_dtype, "", False)  # a wrong name is refused now, not when the weights are loaded
    tell: Report = report or (lambda stage, text, detail: None)
    programs = choose_folder(config.compilation_cache_dir, jax.default_backend())
    use_jax_cache(programs)
    began = time.perf_counter()
    foretold: list[LoadPlan] = []

    def foretell(model: ModelConfig, found: Forecast) -> None:
        foretold.append(with_kernel_plan(config, found.plan, model.dtype))
        tell("forecast", before_loading(foretold[0], found), foretold[0].to_json())

    loaded = read_checkpoint(config, tell, foretell)
    load_seconds, loading = time.perf_counter() - began, peaks(jax.devices()[0])
    loaded = dataclasses.replace(loaded, plan=with_kernel_plan(config, loaded.plan, loaded.config.dtype))
    if is_alias(config.quantization, loaded.plan.method):
        kernels = dict.fromkeys(row.kernel for row in loaded.plan.rows if row.spec is not None)
        log.info(
            "--quantization %s: the name is accepted for %s; what runs is %s",
            *(config.quantization, loaded.plan.method, "; ".join(kernels) or "dense: nothing is quantized"),
        )
    # What headers cannot show: parts whose input scales or permutations differ are kept apart, random weights are made.
    tell("plan", "loaded as planned" if [loaded.plan] == foretold else loaded.plan.to_text(), loaded.plan.to_json())
    if config.self_test is not False:
        run_self_test(config, loaded, tell, programs)
    engine = assemble(config, loaded.config, loaded.params, info=_facts(loaded, load_seconds), programs=programs)
    _prepare_grammars(engine, config)
    engine.describe(sampling_defaults=sampling_defaults(loaded.generation_config, engine.limits))
    totals = measured(engine, loaded.plan, current_device(), loading)
    tell("plan", "\n".join(lines(totals)), totals)
    kv = engine.model_info()["kv"]
    tell("cache", f"{kv['pages']:,} KV pages of {kv['page_size']} tokens, {kv['bytes'] / 2**30:.2f} GiB", kv)
    engine.runner.places = hold_places(engine.runner.device)
    began = time.perf_counter()
    if not config.disable_warmup:
        engine.runner.warm_up(
            lambda done, total, what: tell("compile", f"{done}/{total} {what}", {"done": done, "total": total}),
            runs=warmup_runs(engine),
        )
        if config.constraint_warmup:
            engine.runner.prepare().result()
        if config.chunked_prefill_size is None:
            engine.describe(step_seconds=choose_budget(engine))
    kept = engine.runner.cache_of_programs
    engine.describe(
        warmup_seconds=round(time.perf_counter() - began, 3),
        programs_compiled=engine.runner.compilations,
        programs_from_cache=kept.hits if kept is not None else 0,
    )
    return engine


def run_self_test(config: EngineConfig, loaded: LoadedCheckpoint, tell: Report, programs: Path | None = None) -> None:
    """Raises EngineFailedError where a kernel computes something else than its weights say. Asked for by nobody, it
    runs on GPUs: on a CPU XLA's references are all that runs."""
    device = current_device()
    decode, chunk = step_rows(config, device.platform)
    rows = (*decode, chunk)
    dtype, weights = str(loaded.params["embed"]["weight"].dtype), list(quantized_weights(loaded.params))
    if config.self_test or worth_testing(weights):
        kept = None if programs is None else ProgramCache(programs, environment_facts(jax.devices()[0]))
        for line in self_test(
            weights, dtype, rows, lambda name, lower: compile_program(name, lambda: alone(lower), kept)[0]
        ):
            tell("load", f"self-test {line}", {})


def with_kernel_plan(config: EngineConfig, plan: LoadPlan, dtype: str) -> LoadPlan:
    """The plan with the kernels of this device: in decode steps of all sizes, and in a whole prefill chunk."""
    device = current_device()
    return with_kernels(plan, device, dtype, *step_rows(config, device.platform))


def step_rows(config: EngineConfig, platform: str) -> tuple[tuple[int, ...], int]:
    """(the row counts of decode steps, the tokens of a whole prefill chunk)."""
    defaults = defaults_for(platform)
    running = config.max_running_requests or defaults.max_running_requests
    chunk = config.chunked_prefill_size or defaults.chunked_prefill_size
    return make_buckets(running, 1, fine=defaults.fine_buckets).decode, chunk


def _prepare_grammars(engine: EngineCore, config: EngineConfig) -> None:
    """Constraints, where there is a tokenizer that they can be had with; `scores`: prompts can always be scored."""
    source, revision = config.tokenizer_path or config.model_path, None if config.tokenizer_path else config.revision
    try:
        directory = resolve(source, revision, weights=False)
        why = why_not(directory)
    except JqserveError as error:
        directory, why = "", str(error)
    if not why:
        engine.preparing.grammars = Grammars(directory, engine.limits.vocab_size, engine.limits.eos_token_ids)
    engine.describe(constraints=[] if why else list(KINDS), no_constraints=why, scores=True)


def read_checkpoint(config: EngineConfig, tell: Report, foretell: Foretell | None = None) -> LoadedCheckpoint:
    """Weights in kernel layout on the device. On a CPU the default dtype is float32: bf16 is emulated there."""
    if not config.model_path:
        raise UnsupportedError("no model: give --model-path a checkpoint directory or a Hub id")
    directory = resolve(config.model_path, config.revision, weights=config.load_format != "dummy")
    dtype = config.dtype
    if dtype in (None, "auto") and jax.default_backend() == "cpu":
        dtype = "float32"

    def progress(done: int, total: int, path: str) -> None:
        tell("load", f"{done}/{total} {path}", {"done": done, "total": total})

    if config.load_format == "dummy":
        from jqserve.checkpoint.dummy import load as load_dummy

        return load_dummy(
            directory,
            dtype=dtype,
            activations=config.activations,
            quantization=config.quantization,
            device_put=place,
            seed=config.random_seed,
            progress=progress,
        )
    if config.context_length is not None and not is_store(directory):
        with open_checkpoint(directory, weights=False) as checkpoint:  # now, and not when the weights are loaded
            wanted_context(config, read_configs(checkpoint, dtype)[0], jax.default_backend())
    source, quantization = open_asked(
        directory, config.quantization, config.calibration, config.tokenizer_path, progress=progress
    )
    return load_checkpoint(
        source,
        dtype=dtype,
        activations=config.activations,
        quantization=quantization,
        device_put=place,
        progress=progress,
        foretell=foretell,
    )


def place(weight: Any) -> Any:
    """To the device, and there into the layout of its kernels: the canonical arrays are given up at once."""
    weight = jax.device_put(weight)
    return relayout_leaf(weight) if isinstance(weight, QuantizedTensor) else weight


def _facts(loaded: LoadedCheckpoint, load_seconds: float) -> dict[str, Any]:
    plan = loaded.plan.to_json()
    return {
        "quantization": plan["method"],
        "dtype": loaded.config.dtype,
        "plan": plan["rows"],
        "plan_notes": plan["notes"],
        "weight_bytes": plan["bytes"],
        "generation_config": loaded.generation_config,
        "load_seconds": round(load_seconds, 3),
    }
