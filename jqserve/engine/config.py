"""`EngineConfig`: how to load and run a model, decided once; nothing below it reads the environment."""

from __future__ import annotations

import dataclasses
from numbers import Integral
from typing import Any, Literal

from jqserve.engine.variant import ORDER, Variant
from jqserve.errors import UnsupportedError
from jqserve.models.config import ModelConfig

#: in XLA_FLAGS: no kind of operation goes into command buffers
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
CPU_CONTEXT = 4096  # the CPU's attention reads a sequence's whole page table, whatever of it is in use
#: tokens of a step's prompts: that many of one kind more, and the counts of the penalties (int16) are still right
#: (`sampler.MAX_COUNT`); past a few thousand a larger step is not faster either
MAX_CHUNK = 2**14


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What to load and how to run it. None means: chosen from the model and the device when the engine is built.

    model_path, revision, load_format   a directory or Hub id; "dummy" makes random weights in the checkpoint's scheme
    dtype, quantization, activations    as in `jqserve.load`; kv_dtype: "auto" (the compute dtype) or a KV dtype
    calibration            text for quantization "awq" and "gptq", which calibrate; None: a small built-in one
    max_running_requests   slots: sequences that run at once
    context_length         tokens of prompt and answer together
    mem_fraction_static    share of the GPU's memory for weights and KV pages; xla_fraction: the share that XLA may
                           allocate (its own default is 0.75; `engine/process` sets more before jax is imported)
    chunked_prefill_size   most prompt tokens in one step, rounded up to whole tiles of `tile_size`; at most 16384.
                           None: the device's usual, and beside running answers what the measured step times allow
                           (`engine/budget`)
    num_continuous_decode_steps  decode steps of one dispatch when nobody waits to prefill; 1: always one; None: the
                           device's usual, for few rows
    schedule_conservativeness    of the forecast of KV pages by which requests are admitted; 0 admits as soon as a
                           prompt fits, and preempts when answers grow
    page_size, num_pages   tokens per KV page; pages of the pool
    max_queued             waiting requests beyond which new ones are refused
    random_seed            of the seeds that the offline engine draws for requests without one, and of dummy weights
    disable_overlap_schedule  read each step before the next is dispatched (the tokens are the same)
    disable_mixed_chunk    no decode rows in steps with prefill: prompts go first, and answers wait
    disable_radix_cache    do not look for the beginnings of prompts in pages that are still there
    disable_warmup         compile each shape when it first comes (tests, offline use), not before serving
    disable_cuda_graph     the engine process runs XLA without command buffers, which are CUDA graphs on a GPU; refused
                           where XLA_FLAGS, which it reads once in a process, does not say so (the library)
    self_test              compare kernels with plain dequantization when loaded; None: where there are kernels to test
    log_level              of the engine process: debug | info | warning | error
    tokenizer_path         where the tokenizer is, if not with the model; grammars need it
    constraint_warmup      compile the programs for constrained and scored requests before serving, and not in the
                           background when the first one comes
    profile_dir            where the profiler's traces go; None: a new folder under the system's temporary one
    compilation_cache_dir  an owner-only directory for compiled programs; "off": none; None: on a GPU, one in ~/.cache
    """

    model_path: str = ""
    revision: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: str | None = None
    quantization: str | None = None
    calibration: str | None = None
    activations: Literal["config", "none"] = "config"
    kv_dtype: str = "auto"
    max_running_requests: int | None = None
    context_length: int | None = None
    mem_fraction_static: float = 0.88
    xla_fraction: float = 0.75
    chunked_prefill_size: int | None = None
    num_continuous_decode_steps: int | None = None
    schedule_conservativeness: float = 1.0
    page_size: int | None = None
    tile_size: int | None = None
    num_pages: int | None = None
    max_queued: int = 1024
    random_seed: int = 0
    disable_overlap_schedule: bool = False
    disable_radix_cache: bool = False
    disable_mixed_chunk: bool = False
    disable_warmup: bool = False
    disable_cuda_graph: bool = False
    self_test: bool | None = None
    compilation_cache_dir: str | None = None
    tokenizer_path: str | None = None
    profile_dir: str | None = None
    constraint_warmup: bool = False
    log_level: str = "info"

    def __post_init__(self) -> None:
        if self.load_format not in ("auto", "dummy"):
            raise UnsupportedError(f"load_format {self.load_format!r} is not supported; supported: auto, dummy")
        if self.load_format == "dummy" and self.calibration is not None:
            raise UnsupportedError("calibration: with load_format dummy there are no weights to calibrate")
        if not 0.05 <= self.mem_fraction_static <= 0.98:
            raise UnsupportedError(
                f"mem_fraction_static {self.mem_fraction_static} is not in 0.05 .. 0.98 (usual: 0.8 .. 0.9)"
            )
        for name in (
            "max_running_requests",
            "context_length",
            "chunked_prefill_size",
            "num_continuous_decode_steps",
            "page_size",
            "tile_size",
            "num_pages",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise UnsupportedError(f"{name} must be an integer, found {value!r}")
            if value is not None and value < 1:
                raise UnsupportedError(f"{name} must be at least 1, found {value}")
        for name in ("chunked_prefill_size", "tile_size"):
            if (getattr(self, name) or 0) > MAX_CHUNK:
                raise UnsupportedError(
                    f"{name} {getattr(self, name)} is more than {MAX_CHUNK} (usual: 2048); a longer prompt takes "
                    "several steps"
                )
        if not 0 <= self.schedule_conservativeness <= 10:
            raise UnsupportedError(
                f"schedule_conservativeness {self.schedule_conservativeness} is not in 0 .. 10 (usual: 0 .. 1)"
            )
        if self.disable_warmup and self.constraint_warmup:
            raise UnsupportedError(
                "constraint_warmup is a part of the warm-up: leave out --disable-warmup (in the library, "
                "give disable_warmup=False)"
            )
        if self.max_queued < 0:
            raise UnsupportedError(f"max_queued must not be negative, found {self.max_queued}")

    @staticmethod
    def from_json(fields: dict[str, Any]) -> EngineConfig:
        """From the keys of `wire.Configure`; None keeps the default. Raises UnsupportedError for an unknown key."""
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := sorted(set(fields) - known):
            raise UnsupportedError(f"unknown engine options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return EngineConfig(**{name: value for name, value in fields.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class DeviceDefaults:
    """What suits a kind of device, where the user has not said."""

    max_running_requests: int
    chunked_prefill_size: int
    page_size: int
    tile_size: int
    fine_buckets: bool
    variants: tuple[Variant, ...]  # those that have programs of their own
    cut_masked: bool  # decode steps with masks have their first layers in a program of their own (`engine/programs`)
    decode_steps: int  # of a dispatch of at most `decode_steps_rows` rows when nobody waits to prefill
    decode_steps_rows: int
    warmup_runs: int  # XLA captures a CUDA graph on a program's second or third run


#: A CPU computes every padded row, and its users wait for every compilation (~5 s of processor time each); a dispatch
#: costs it nothing beside a step.
#: The GPU figures follow the attention kernels: pages of 64 tokens, tiles of 128 queries (prefill takes no others).
#: Handing a program over costs the host 2.3 ms on an H200, and a step of a few rows of an 8B model takes 2.1 (4 bits)
#: to 4.4 ms: two steps a dispatch hide it (4-bit, batch 1, bench/results/decode.json: 411 tokens/s with one step, 477
#: with four). From 64 rows on a step is longer than its launch, and more of them would only make newcomers wait.
CPU = DeviceDefaults(16, 128, 16, 32, False, (Variant.SCORED,), False, 1, 1, 1)
GPU = DeviceDefaults(256, 2048, 64, 128, True, ORDER, True, 2, 8, 3)


def decode_steps(asked: int | None, defaults: DeviceDefaults) -> tuple[int, int | None]:
    """(decode steps of a dispatch, the rows up to which it has them): what was asked for holds for every batch."""
    return (asked, None) if asked else (defaults.decode_steps, defaults.decode_steps_rows)


def prefill_tiles(tokens: int, tile_size: int) -> int:
    """Tiles of a step that holds so many prompt tokens: rounded up, but not over MAX_CHUNK."""
    return min(-(-tokens // tile_size), MAX_CHUNK // tile_size)


def wanted_context(config: EngineConfig, model: ModelConfig, platform: str) -> int:
    """Tokens of prompt and answer together, if the pool holds them. Raises UnsupportedError for more than the model's
    positions."""
    if config.context_length is None:
        return min(model.max_position, CPU_CONTEXT) if platform == "cpu" else model.max_position
    if config.context_length > model.max_position:
        raise UnsupportedError(
            f"context_length {config.context_length} is more than the model's {model.max_position} positions; "
            f"choose at most {model.max_position}"
        )
    return config.context_length


def defaults_for(platform: str) -> DeviceDefaults:
    return CPU if platform == "cpu" else GPU
