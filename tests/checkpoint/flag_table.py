"""Every kind of checkpoint with every value of --quantization, --torchao-config and --kv-cache-dtype:
docs/quantization-flags.md.

python -m tests.checkpoint.flag_table        writes the table anew; tests/checkpoint/test_flags.py compares it
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.checkpoint.asked import FORMATS, describe
from jqserve.checkpoint.online import ONLINE, TORCHAO
from jqserve.checkpoint.open import open_checkpoint
from jqserve.checkpoint.opening import Activations, open_model
from jqserve.checkpoint.readers.gguf import DECODERS
from jqserve.engine.cache import kv_dtype, kv_source
from jqserve.engine.calibrated import open_asked
from jqserve.errors import UnsupportedError
from tests.checkpoint import configs as c
from tests.checkpoint import gguf_files, tiny
from tests.checkpoint import tiny_more as m

TABLE = Path(__file__).resolve().parents[2] / "docs" / "quantization-flags.md"
F8, I8 = c.weights(8, "float", "channel"), c.weights(8, "int", "channel")
BLOCK_WEIGHTS = {**c.weights(8, "float", "block"), "block_structure": [128, 128]}
BLOCK_INPUTS = {**c.inputs("float"), "strategy": "group", "group_size": 128}
CHECKPOINTS: dict[str, tuple[tiny.Maker, dict[str, Any] | None]] = {
    "unquantized": (tiny.dense, None),
    "unquantized fp16": (functools.partial(tiny.dense, dtype=np.float16), None),
    "unquantized fp32": (functools.partial(tiny.dense, dtype=np.float32), None),
    "AWQ": (tiny.awq(128), c.awq(128)),
    "GPTQ 4-bit": (tiny.gptq(), c.gptq()),
    "GPTQ 4-bit, groups of 32, act-order": (tiny.gptq(4, 32, desc_act=True), c.gptq(4, 32, desc_act=True)),
    "GPTQ 4-bit, zero points": (tiny.gptq(4, 128, False), c.gptq(4, 128, False)),
    "GPTQ 8-bit": (tiny.gptq(8), c.gptq(8)),
    "GPTQ 3-bit": (tiny.gptq(3), c.gptq(3)),
    "GPTQ 4-bit, `dynamic` overrides to 8": (tiny.gptq(8), c.gptq(dynamic={r"+:.*_proj": {"bits": 8}})),
    "GPTQ in Marlin's layout": (m.marlin(128), c.gptq(checkpoint_format="marlin", format="marlin")),
    "compressed-tensors W4A16": (tiny.packed(), c.compressed("pack-quantized", c.weights(4, "int", "group", 128))),
    "compressed-tensors W4A16, zero points": (
        tiny.packed(4, 128, sym=False),
        c.compressed("pack-quantized", c.weights(4, "int", "group", 128, sym=False)),
    ),
    "compressed-tensors W8A16": (
        tiny.packed(8, None),
        c.compressed("pack-quantized", c.weights(8, "int", "channel")),
    ),
    "compressed-tensors FP8 dynamic": (tiny.eight(), c.compressed("float-quantized", F8, c.inputs("float"))),
    "compressed-tensors FP8 static": (
        tiny.eight(shape="tensor", static=True),
        c.compressed("float-quantized", c.weights(8, "float", "tensor"), c.inputs("float", static=True)),
    ),
    "compressed-tensors FP8 blocks": (
        m.blocks("weight_scale"),
        c.compressed("float-quantized", BLOCK_WEIGHTS, BLOCK_INPUTS),
    ),
    "compressed-tensors INT8 dynamic": (tiny.eight("int"), c.compressed("int-quantized", I8, c.inputs("int"))),
    "compressed-tensors INT8 static": (
        tiny.eight("int", static=True),
        c.compressed("int-quantized", I8, c.inputs("int", static=True)),
    ),
    "fp8 per tensor": (tiny.eight(shape="scalar"), c.fp8()),
    "fp8 per tensor, static": (tiny.eight(shape="scalar", static=True), c.fp8("static")),
    "fp8 in blocks (DeepSeek)": (m.blocks(), c.fp8(weight_block_size=[128, 128])),
    "bitsandbytes nf4": (m.bnb4(), m.bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bitsandbytes nf4, double quantization": (
        m.bnb4("nf4", True),
        m.bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes fp4": (m.bnb4("fp4"), m.bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "bitsandbytes fp4, double quantization": (
        m.bnb4("fp4", True),
        m.bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes int8": (m.bnb8, m.bnb(load_in_8bit=True)),
    "torchao int8wo": (m.torchao8(), m.torchao("Int8WeightOnlyConfig")),
    "torchao int8dq": (m.torchao8(), m.torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao fp8wo": (m.torchao8("fp8"), m.torchao("Float8WeightOnlyConfig")),
    "torchao fp8dq-per_row": (m.torchao8("fp8"), m.torchao("Float8DynamicActivationFloat8WeightConfig")),
    "torchao fp8dq-per_tensor": (
        m.torchao8("fp8", True),
        m.torchao("Float8DynamicActivationFloat8WeightConfig", granularity={"_type": "PerTensor", "_data": {}}),
    ),
    **{
        f"torchao int4wo-{group}": (m.torchao4(group), m.torchao("Int4WeightOnlyConfig", group_size=group))
        for group in (32, 64, 128, 256)
    },
}
GGUF = ("F16", "BF16", *DECODERS)
KV_FLAGS = ("auto", "bf16", "fp16", "fp32", "fp8", "fp8_e4m3", "fp8_e5m2", "int8")
NAMES = list(dict.fromkeys(("auto", *ONLINE, *FORMATS, "w4afp8")))
OTHERS = ("activations:none", *(f"dtype:{name}" for name in ("bfloat16", "float16", "float32")))
FLAGS = [*NAMES, *(f"torchao:{name}" for name in TORCHAO), *OTHERS]
HEAD = """# Checkpoints and flags

Generated by `python -m tests.checkpoint.flag_table`; a test compares it. For every kind of checkpoint, what becomes of
every value of `--quantization`, `--torchao-config`, `--activations`, `--dtype` and `--kv-cache-dtype`: *accepted* with
the scheme that the modules get, or the text of the refusal, which comes before anything is loaded.
"""


def shown(flag: str) -> str:
    """As the user writes it."""
    name, _, value = flag.rpartition(":")
    return {"": "--quantization", "torchao": "--torchao-config"}.get(name, f"--{name}") + f" {value}"


def outcome(path: Path, flag: str) -> tuple[str, bool, str]:
    """(the schemes the modules get, whether accepted, the note or the refusal)."""
    dtype = flag.removeprefix("dtype:") if flag.startswith("dtype:") else None
    activations: Activations = "none" if flag == "activations:none" else "config"
    flag = "auto" if flag in OTHERS else flag
    try:
        source, rest = open_asked(path, flag, headers_alone=True)
        with open_checkpoint(source) as checkpoint:
            opened = open_model(checkpoint, dtype, activations, rest)
    except UnsupportedError as error:
        return "", False, str(error).replace(str(path), "MODEL")
    specs = dict.fromkeys(
        describe(part.scheme.method, spec).split(": ", 1)[1]
        for module in opened.audited.modules
        if not hasattr(module, "shape")
        for part in module.parts
        for spec in [part.scheme.spec(part.slot.n, part.slot.k)]
        if spec is not None
    )
    schemes = "; ".join(specs) or "not quantized"
    return f"{schemes}; computed in {opened.config.dtype}" if dtype else schemes, True, opened.note


def rows(folder: Path) -> Iterator[tuple[str, str, str, bool, str]]:
    """(checkpoint, flag, schemes, accepted, text) of every pair. Anything but UnsupportedError is let through."""
    for i, (name, (maker, quantization)) in enumerate(CHECKPOINTS.items()):
        made = tiny.make(folder / str(i), maker, quantization, num_hidden_layers=1, hidden_size=256)
        for flag in FLAGS:
            yield name, flag, *outcome(made.path, flag)
    for kind in GGUF:
        path = gguf_files.write(folder / f"{kind}.gguf", kind)
        for flag in FLAGS:
            yield f"GGUF {kind}", flag, *outcome(path, flag)


def caches() -> Iterator[str]:
    """Lines on --kv-cache-dtype, which goes with every checkpoint alike."""
    for title, scaled in (("with scales for keys and values (`kv_cache_scheme`)", True), ("without", False)):
        yield f"\n## --kv-cache-dtype, checkpoints {title}\n\n| flag | | |\n| --- | --- | --- |"
        for asked in KV_FLAGS:
            try:
                dtype = kv_dtype(asked, "bfloat16", scaled)
            except UnsupportedError as error:
                yield f"| `--kv-cache-dtype {asked}` | refused | {error} |"
                continue
            told = kv_source(dtype, scaled)
            yield f"| `--kv-cache-dtype {asked}` | accepted | {dtype}{'. ' + told if told else ''} |"


def text(folder: Path) -> str:
    parts, last = [HEAD], ""
    for name, flag, schemes, accepted, note in rows(folder):
        if name != last:
            parts.append(f"\n## {name}\n\n| flag | | |\n| --- | --- | --- |")
            last = name
        said = f"{schemes}{'. ' + note if note else ''}" if accepted else note
        parts.append(f"| `{shown(flag)}` | {'accepted' if accepted else 'refused'} | {said.replace('|', '/')} |")
    return "\n".join([*parts, *caches()]) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text(Path(scratch)))
