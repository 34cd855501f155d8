"""What of a step XLA puts into command buffers (CUDA graphs), by the thunk sequence that it dumps for an H200."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest

from jqserve.engine.batch import StepShape
from jqserve.engine.buckets import Bucket
from jqserve.engine.cache import cache_shape
from jqserve.engine.lowering import traceable
from jqserve.engine.programs import Draw, Forward, Fused, Program, captured
from jqserve.engine.slots import empty
from jqserve.engine.step import make_state
from jqserve.engine.variant import Variant
from jqserve.models.build import build, split
from jqserve.ops.compiler_options import compiler_options
from pallas_kernels.dispatch import KNOWN_DEVICES, use_device
from tests.engine.test_step_kernels import LAYERS, ROWS, VOCAB, fp8_model
from tests.pallas_kernels.aot import compile_for_h200

SHAPE = StepShape(ROWS, 64, 8, 128, VOCAB)


def thunks_of(program: Program, **options: Any) -> tuple[list[str], list[str]]:
    """The kinds of its thunks: (those that the host launches, command buffers among them; those in command buffers)."""
    with use_device(KNOWN_DEVICES["h200"]):
        config, params = fp8_model()
    structure, leaves = split(build(config, params))
    cache = cache_shape(config, page_size=64, pages=100, dtype="bfloat16")
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty(ROWS))
    state = jax.eval_shape(lambda: make_state(SHAPE))
    one = traceable(structure, SHAPE, program, leaves, cache.abstract(), state, given)
    compiled = compile_for_h200(
        one.function,
        *one.arguments,
        donate_argnums=one.donated,
        compiler_options=compiler_options(captured(program)) | options,
        thunks=True,
    )
    outside: list[str] = []
    within: list[str] = []
    buffer = None  # how far the last command buffer's line is indented; what is in it stands deeper, behind it
    for indent, kind in re.findall(r"^( *)\d+: k(\w+)", compiled.thunks, re.MULTILINE):
        if buffer is not None and len(indent) > buffer:
            within.append(kind)
            continue
        buffer = len(indent) if kind == "CommandBuffer" else None
        outside.append(kind)
    assert outside, "XLA dumped no thunk sequence"
    return outside, within


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        Fused(Bucket(ROWS, 0), Variant.GREEDY),
        Forward(Bucket(ROWS, 0), ROWS),
        Forward(Bucket(ROWS, 2), ROWS + 2),
        Draw(ROWS, Variant.SAMPLE),
    ],
    ids=lambda program: program.name,
)
def test_a_step_is_one_command_buffer(program: Program) -> None:
    """All of it: each thunk left outside costs a launch of its own, and the device waits where the graph is cut."""
    outside, within = thunks_of(program)
    assert outside == ["CommandBuffer"]
    layers = 0 if isinstance(program, Draw) else LAYERS
    assert within.count("CustomCall") >= 10 * layers


@pytest.mark.slow
def test_each_of_several_steps_is_one_command_buffer() -> None:
    """The loop itself is the host's, which knows the trip count: of its condition's kernel only the dump tells."""
    outside, within = thunks_of(Fused(Bucket(ROWS, 0, 2), Variant.GREEDY))
    assert outside == ["CommandBuffer", "While", "CustomKernel", "CommandBuffer"]
    assert within.count("CustomCall") == 10 * LAYERS


@pytest.mark.slow
def test_prompts_alone_and_a_switched_off_step_are_captured_by_none() -> None:
    prompts = thunks_of(Forward(Bucket(0, 2), 2))
    off = thunks_of(Fused(Bucket(ROWS, 0), Variant.GREEDY), xla_gpu_enable_command_buffer="")
    for outside, within in (prompts, off):
        assert outside.count("CustomCall") == 10 * LAYERS and "CommandBuffer" not in outside and not within
