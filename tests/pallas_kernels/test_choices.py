"""Choosing without tracing: what `choice.py` says of shapes alone is what tracing finds, and needs no jax."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from typing import Any

import jax
import pytest

from pallas_kernels import KNOWN_DEVICES, dispatch, explain, tuning, use_device
from pallas_kernels.a16 import held_config
from pallas_kernels.a16.choice import packed
from pallas_kernels.a16.decode_plan import Config
from pallas_kernels.dispatch import Operand
from pallas_kernels.scaled_matmul import choice as scaled
from pallas_kernels.scaled_matmul.config import Config as ScaledConfig
from pallas_kernels.w4a16 import choice as four
from pallas_kernels.w4a16 import layout as four_layout
from pallas_kernels.w8a16 import choice as eight
from pallas_kernels.w8a16 import layout as eight_layout

DEVICES = ("h200", "a100", "cpu")
ROWS = (0, 1, 9, 16, 17, 1000)
#: (N, K): two of an 8B model (the held kernel takes the wide one), one that needs padding, one whose K no kernel takes
#: as it is, one that is small
SHAPES = ((6144, 4096), (28672, 4096), (1100, 1088), (1096, 2888), (64, 128))


def struct(a: Operand | None) -> Any:
    return None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype)


def weight_operands(n: int, k: int, group: int, zero: str) -> tuple[Operand, Operand | None, Operand | None]:
    """Canonical scale, zero and offset."""
    grid = (n, 1 if group == -1 else -(-k // group))
    scale = Operand(grid, "float16")
    integer = Operand(grid, "uint8") if zero == "int" else None
    offset = Operand(grid, "float16") if zero == "offset" else None
    return scale, integer, offset


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only(device: str, n: int, k: int, bits: int) -> None:
    target = KNOWN_DEVICES[device]
    choice, layouts = (four, four_layout) if bits == 4 else (eight, eight_layout)
    seen = set()
    for group, zero in itertools.product((-1, 32, 40, 128), ("none", "int", "offset")[: 3 if bits == 4 else 2]):
        scale, integer, offset = weight_operands(n, k, group, zero)
        stored = "uint4" if bits == 4 else "uint8"
        layout = choice.preferred_layout(n, k, group, zero, target)
        qweight = Operand((n, k // 2 if bits == 4 else k), "uint8")
        if layout != "canonical":
            canonical = [struct(a) for a in (qweight, scale, integer, *((offset,) if bits == 4 else ()))]
            to_layout = functools.partial(layouts.to_layout, layout=layout, group_size=group)
            expected = jax.eval_shape(to_layout, *canonical)
            qweight, scale, integer, offset = packed((n, k), group, layout, stored, scale, integer, offset)
            found = [qweight, scale, integer, offset][: len(expected)]
            assert [a and (a.shape, str(a.dtype)) for a in expected] == [a and (a.shape, a.dtype) for a in found]
        for m, x_dtype in itertools.product(ROWS, ("bfloat16", "float32")):
            kwargs: dict[str, Any] = {"group_size": group, "layout": layout}
            operands = (Operand((m, k), x_dtype), qweight, scale, integer)
            more = {"offset": offset} if bits == 4 else {}
            told = dispatch.choose(choice.OP, choice.CANDIDATES, *operands, device=target, **more, **kwargs)
            structs = {name: struct(a) for name, a in more.items()}
            assert told == explain(choice.OP, *map(struct, operands), device=target, **structs, **kwargs)
            seen.add(told.chosen)
    hopper = {"decode_sm90", "wgmma_sm90", "xla"} | ({"held_sm90"} if n >= held_config.MIN_ROWS else set())
    assert seen == (hopper if device == "h200" else {"xla"})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_scaled(device: str, n: int, k: int) -> None:
    target = KNOWN_DEVICES[device]
    blocks = (-(-n // 128), -(-k // 128))
    for m, dtype, out in itertools.product(ROWS, ("int8", "float8_e4m3fn"), ("bfloat16", "float32")):
        for x_scale, w_scale in (((m, 1), (n, 1)), ((1, 1), (1, 1)), ((m, blocks[1]), blocks)):
            operands = (
                Operand((m, k), dtype),
                Operand((n, k), dtype),
                Operand(x_scale, "float32"),
                Operand(w_scale, "float32"),
            )
            told = dispatch.choose(scaled.OP, scaled.CANDIDATES, *operands, None, device=target, out_dtype=out)
            asked = [struct(a) for a in operands]
            assert told == explain(scaled.OP, *asked, None, device=target, out_dtype=out)


def test_a_forced_config_that_cannot_run_is_refused_by_both() -> None:
    """The tuner's answer is part of the choice: one that the kernel cannot run falls through to the next."""
    device, layout = KNOWN_DEVICES["h200"], "sm90"
    scale, _, _ = weight_operands(6144, 4096, 128, "none")
    qweight, scale, _, _ = packed((6144, 4096), 128, layout, "uint4", scale, None, None)
    operands = (Operand((1, 4096), "bfloat16"), qweight, scale, None)
    kwargs: dict[str, Any] = {"group_size": 128, "layout": layout}
    with use_device(device), tuning.recording() as asked:
        dispatch.choose(four.OP, four.CANDIDATES, *operands, device=device, **kwargs)
    with tuning.forcing(four.OP, asked[0].key, Config(row_tiles=4, row_warps=4, k_warps=16)):
        told = dispatch.choose(four.OP, four.CANDIDATES, *operands, device=device, **kwargs)
        assert told.chosen == "wgmma_sm90" and "more than 16 warps" in told.refused[1][1]
        assert told == explain(four.OP, *map(struct, operands), device=device, **kwargs)


def test_a_forced_config_of_scaled_matmul() -> None:
    device = KNOWN_DEVICES["h200"]
    operands = (
        Operand((64, 4096), "float8_e4m3fn"),
        Operand((6144, 4096), "float8_e4m3fn"),
        Operand((64, 32), "float32"),
        Operand((48, 32), "float32"),
    )
    with use_device(device), tuning.recording() as asked:
        dispatch.choose(scaled.OP, scaled.CANDIDATES, *operands, None, device=device, out_dtype="bfloat16")
    for config, reason in (
        (ScaledConfig(144, stages=2), "epilogue_n 64 must divide"),
        (ScaledConfig(128, wgs_k=2, stages=3), "wgs_k 2 must divide"),
    ):
        with tuning.forcing(scaled.OP, asked[0].key, config):
            told = dispatch.choose(scaled.OP, scaled.CANDIDATES, *operands, None, device=device, out_dtype="bfloat16")
            assert told.chosen == "xla" and reason in told.refused[0][1]
            assert told == explain(scaled.OP, *map(struct, operands), None, device=device, out_dtype="bfloat16")


def test_choosing_loads_no_jax_and_hides_no_function() -> None:
    """Folders named like functions are imported first here: `from pallas_kernels import scaled_matmul` is the function
    all the same."""
    code = (
        "import sys\n"
        "import pallas_kernels, pallas_kernels.w4a16.choice, pallas_kernels.w8a16.choice\n"
        "import pallas_kernels.scaled_matmul.choice\n"
        "assert not {'jax', 'jaxlib'} & set(sys.modules)\n"
        "from pallas_kernels import scaled_matmul, grouped_matmul\n"
        "import pallas_kernels.grouped_matmul.reference\n"
        "assert callable(scaled_matmul) and callable(pallas_kernels.grouped_matmul), pallas_kernels.grouped_matmul\n"
        "missing = [name for name in pallas_kernels.__all__ if not hasattr(pallas_kernels, name)]\n"
        "assert not missing, missing\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
