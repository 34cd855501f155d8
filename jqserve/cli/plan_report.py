"""The numbers of `jqserve plan`: weights, memory, KV tokens, the bound, the split over GPUs, buckets, warnings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jqserve.checkpoint.forecast import Forecast, forecast
from jqserve.checkpoint.hub import planned
from jqserve.checkpoint.loaded import Activations
from jqserve.checkpoint.open import AnyCheckpoint, is_store, open_checkpoint
from jqserve.checkpoint.opening import KV_MISSING, open_model
from jqserve.checkpoint.plan import LoadPlan, PlanRow
from jqserve.checkpoint.store_forecast import forecast_store
from jqserve.cli.present_gpu import planned_device
from jqserve.cli.scheme_flags import quantization_of
from jqserve.cli.server import ENGINE_FLAGS, GIVEN_FLAGS
from jqserve.engine.buckets import make_buckets
from jqserve.engine.cache import CHECKPOINT_SCALES, cache_shape, kv_dtype, kv_source, slow_pages
from jqserve.engine.calibrated import open_asked
from jqserve.engine.config import EngineConfig, decode_steps, defaults_for, prefill_tiles, wanted_context
from jqserve.engine.kernel_plan import with_kernels
from jqserve.engine.remarks import folded, of_rows
from jqserve.engine.totals import MEMORY, bucket_facts, bytes_read
from jqserve.errors import UnsupportedError
from jqserve.models.config import ModelConfig
from jqserve.ops.layouts import check_supported
from pallas_kernels import KNOWN_DEVICES

DUMMY = "--load-format dummy: the tensors are those that config.json describes, their values random"
#: What the engine keeps for activations and libraries beside weights and pages, roughly; it measures, we do not.
RESERVE = 1.5e9


def report(args: argparse.Namespace) -> tuple[LoadPlan, dict[str, Any]]:
    """(the plan with kernels, the totals). Raises what loading would raise, and for sizes that make no sense."""
    if args.tp < 1:
        raise UnsupportedError(f"--tp {args.tp}: must be at least 1")
    name, unknown = planned_device(args.device)
    asked = engine_config(args)
    dtype = None if asked.dtype == "auto" else asked.dtype
    if dtype is None and name == "cpu":
        dtype = "float32"  # as the engine computes there
    real = asked.load_format != "dummy"
    with planned(args.model_path if args.model is None else args.model, args.revision, weights=real) as directory:
        source: str | Path | AnyCheckpoint = directory
        quantization = quantization_of(args)
        if real:  # random weights are nothing to calibrate on: refused as loading them does
            source, quantization = open_asked(directory, quantization, asked.calibration, headers_alone=True)
        config, found = _foretold(source, dtype, asked.activations, quantization)
    for row in found.plan.rows:
        if row.spec is not None:
            check_supported(row.path, row.spec)
    device = KNOWN_DEVICES[name]
    defaults = defaults_for(device.platform)
    running = asked.max_running_requests or defaults.max_running_requests
    chunk = asked.chunked_prefill_size or defaults.chunked_prefill_size
    steps, steps_rows = decode_steps(asked.num_continuous_decode_steps, defaults)
    tiles = prefill_tiles(chunk, defaults.tile_size)
    buckets = make_buckets(running, tiles, fine=defaults.fine_buckets, steps=steps, steps_rows=steps_rows)
    plan = with_kernels(found.plan, device, config.dtype, buckets.decode, chunk)
    facts = _totals(asked, name, args.tp, config, found)
    facts |= {
        "buckets": bucket_facts(buckets, defaults.tile_size),
        "unquantized": folded(found.unquantized),
        "warnings": _warnings(plan, facts, found.kv_missing) + [DUMMY] * (not real) + [unknown] * bool(unknown),
    }
    return plan, facts


def _foretold(
    source: str | Path | AnyCheckpoint, dtype: str | None, activations: Activations, quantization: str | None
) -> tuple[ModelConfig, Forecast]:
    if isinstance(source, (str, Path)) and is_store(source):
        return forecast_store(Path(source), dtype, activations, quantization)
    with open_checkpoint(source) as checkpoint:
        opened = open_model(checkpoint, dtype, activations, quantization)
        return opened.config, forecast(opened)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """What the server's flags say of the engine. Raises UnsupportedError as the engine does."""
    names = (*ENGINE_FLAGS, *GIVEN_FLAGS)
    given = {name: value for name in names if (value := getattr(args, name)) is not None and value is not False}
    return EngineConfig(**{"dtype": "auto", **given})


def _totals(asked: EngineConfig, name: str, n: int, config: ModelConfig, found: Forecast) -> dict[str, Any]:
    """name: of the device; n: GPUs."""
    memory, speed = MEMORY[name]
    rows = found.plan.rows
    weights = sum(row.bytes for row in rows) + found.vectors
    read = bytes_read(found.plan, weights)
    problems = [p for row in rows for p in _cuts(row, config, n)] if n > 1 else []
    kv_parts = _kv_parts(config, n)
    shared = sum(row.bytes for row in rows)
    repeated = sum(round(row.bytes * _kv_share(row, config) * (1 / kv_parts - 1 / n)) for row in rows)
    per_gpu = weights if n == 1 else -(-shared // n) + repeated + found.vectors
    peak_device, peak_host = found.peak_bytes(per_gpu)
    dtype = kv_dtype(asked.kv_dtype, config.dtype, found.kv_scaled)
    page = asked.page_size or defaults_for(KNOWN_DEVICES[name].platform).page_size
    shape = cache_shape(config, page_size=page, pages=1, dtype=dtype)
    kv_token = shape.page_bytes // page // kv_parts
    free = memory * asked.mem_fraction_static - per_gpu - RESERVE
    room = max(0, int(free // kv_token))
    tokens = asked.num_pages * page if asked.num_pages else room
    context = wanted_context(asked, config, KNOWN_DEVICES[name].platform)
    return {
        "model": {"architecture": config.architecture, "dtype": config.dtype, "context_length": context},
        "device": {"name": name, "memory_bytes": memory, "bytes_per_second": speed},
        "weight_bytes": weights,
        "peak_device_bytes": peak_device,
        "peak_host_bytes": peak_host,
        "kv_cache": {
            "dtype": dtype,
            "bytes_per_token": kv_token,
            "tokens": tokens,
            "room": room,
            "scales": kv_source(dtype, found.kv_scaled),
            "slow_pages": slow_pages(shape, KNOWN_DEVICES[name]),
        },
        "read_bytes_per_step": read,
        "bound_tokens_per_second": speed * n / read,
        "tp": {"size": n, "bytes_per_gpu": per_gpu, "problems": list(dict.fromkeys(problems))},
    }


def _kv_parts(config: ModelConfig, n: int) -> int:
    """A GPU holds its share of the KV heads; where there are more GPUs than heads, one head, repeated."""
    return n if config.kv_heads % n == 0 else config.kv_heads if n % config.kv_heads == 0 else 1


def _kv_share(row: PlanRow, config: ModelConfig) -> float:
    """The part of a module's rows that belongs to KV heads."""
    part = {"qkv": 2 * config.kv_heads / (config.heads + 2 * config.kv_heads), "k": 1.0, "v": 1.0}
    return part.get(row.path.rpartition(".")[2], 0.0)


def _cut_blocks(row: PlanRow, config: ModelConfig, n: int) -> list[str]:
    """Scales of blocks of rows (fp8's 128x128) split only where a block ends."""
    block, tail = (row.spec.group_shape[0] if row.spec else 1), row.path.rpartition(".")[2]
    if block in (1, row.shape[0]):
        return []
    kv = config.kv_heads * config.head_dim // _kv_parts(config, n)
    parts = {
        "qkv": [config.heads * config.head_dim // n, kv],
        "k": [kv],
        "v": [kv],
        "gate_up": [row.shape[0] // 2 // n],
    }
    rows = parts.get(tail, [row.shape[0] // n] if tail in ("q", "gate", "up", "lm_head") else [])
    return [f"{tail}: {m} output features a GPU do not end with a block of {block}" for m in rows if m % block]


def _cuts(row: PlanRow, config: ModelConfig, n: int) -> list[str]:
    """Why a module cannot be split over n GPUs as Megatron does: q, k, v, gate, up by rows, o and down by columns."""
    tail = row.path.rpartition(".")[2]
    found = _cut_blocks(row, config, n)
    if tail in ("qkv", "q", "k", "v"):
        if config.heads % n:
            found.append(f"{config.heads} heads do not split over {n} GPUs")
        if config.kv_heads % n and n % config.kv_heads:
            found.append(f"{config.kv_heads} KV heads neither split nor repeat over {n} GPUs")
    if tail in ("o", "down"):
        k, group = row.shape[1], row.group or 1
        if k % n or (k // n) % group:
            found.append(f"{tail}: {k} input features in groups of {group} do not split over {n} GPUs at group borders")
        if "act-order" in row.scheme:
            found.append(f"{tail}: act-order mixes its groups: its input has to be gathered first")
    elif (
        tail in ("gate_up", "gate", "up", "lm_head", "embed") and (row.shape[0] // (2 if tail == "gate_up" else 1)) % n
    ):
        found.append(f"{tail}: {row.shape[0]} output features do not split over {n} GPUs")
    return found


def _warnings(plan: LoadPlan, facts: dict[str, Any], missing: bool) -> list[str]:
    """missing: KV scales that config.json promises."""
    found = of_rows(plan)
    kv = facts["kv_cache"]
    if kv["scales"] and kv["scales"] != CHECKPOINT_SCALES:
        found.append(f"KV cache in {kv['dtype']}: {kv['scales']}")
    if kv["slow_pages"] is not None:
        found.append(kv["slow_pages"])
    if missing and not kv["dtype"].startswith("fp8"):
        found.append(KV_MISSING)
    found += facts["tp"]["problems"]
    memory, peak = facts["device"]["memory_bytes"] / 2**30, facts["peak_device_bytes"] / 2**30
    if peak > memory:
        name = facts["device"]["name"]
        found.append(f"does not fit: loading needs {peak:.3f} GiB of the device at its peak, {name} has {memory:.3f}")
    if kv["tokens"] > kv["room"]:
        found.append(f"--num-pages: {kv['tokens']:,} KV tokens are asked for, about {kv['room']:,} fit")
    if facts["kv_cache"]["tokens"] < facts["model"]["context_length"]:
        found.append(
            f"{facts['kv_cache']['tokens']:,} KV tokens fit, fewer than one request of context length "
            f"{facts['model']['context_length']:,} may need"
        )
    return found
