"""Flags against checkpoints: the checked-in table is what happens, and some of its pairs are what they must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jqserve.checkpoint import store
from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.errors import UnsupportedError
from tests.checkpoint import configs as c
from tests.checkpoint import flag_table, gguf_files, tiny


def test_the_table_is_what_happens(tmp_path: Path) -> None:
    """`python -m tests.checkpoint.flag_table` writes it anew."""
    found, stored = flag_table.text(tmp_path).splitlines(), flag_table.TABLE.read_text().splitlines()
    differ = [f"- {a}\n+ {b}" for a, b in zip(stored, found) if a != b]
    assert not differ and len(found) == len(stored), "\n".join(differ[:5])
    pairs = sum(line.startswith("| `--") for line in found)
    kinds = len(flag_table.CHECKPOINTS) + len(flag_table.GGUF)
    assert pairs == kinds * len(flag_table.FLAGS) + 2 * len(flag_table.KV_FLAGS) > 800


def test_what_a_refusal_says(tmp_path: Path) -> None:
    """What the checkpoint is, what was asked, and a command that works."""
    accepted = 0
    for name, flag, schemes, ok, text in flag_table.rows(tmp_path):
        accepted += ok
        if ok:
            continue
        shown = f"--torchao-config {flag[8:]}" if flag.startswith("torchao:") else f"--quantization {flag}"
        assert text.startswith(shown) and not schemes, (name, flag)
        if flag != "w4afp8":
            assert "`jqserve-server --model-path MODEL" in text and "the checkpoint is " in text, text
    assert 300 < accepted < 800


PAIRS = {  # checkpoint, flag -> accepted
    ("compressed-tensors INT8 dynamic", "w8a8_int8"): True,
    ("compressed-tensors FP8 dynamic", "w8a8_fp8"): True,
    ("compressed-tensors FP8 static", "w8a8_fp8"): False,  # per tensor, static: not what was asked
    ("compressed-tensors INT8 dynamic", "w8a8_fp8"): False,
    ("AWQ", "awq_marlin"): True,
    ("AWQ", "gptq_marlin"): False,
    ("GPTQ 4-bit", "gptq_marlin"): True,
    ("GPTQ 4-bit", "awq"): False,
    ("GPTQ 4-bit", "int4-128"): True,
    ("GPTQ 4-bit", "int4-64"): False,
    ("GPTQ 3-bit", "int4"): False,  # held in 4 bits, and not what was asked
    ("GPTQ 3-bit", "gptq"): True,
    ("GGUF Q2_K", "int4"): False,
    ("GGUF Q6_K", "int8"): False,
    ("GGUF Q4_0", "int4-32"): True,
    ("GGUF Q8_0", "int8"): True,
    ("fp8 in blocks (DeepSeek)", "fp8"): True,
    ("fp8 in blocks (DeepSeek)", "w8a8_fp8"): False,
    ("unquantized", "awq"): True,
    ("unquantized", "gptq_marlin"): True,
    ("unquantized", "int4-32"): True,
    ("bitsandbytes nf4", "bitsandbytes"): True,
    ("torchao int8dq", "torchao:int8dq"): True,
    ("torchao int8dq", "torchao:int8wo"): False,
    ("torchao int4wo-64", "torchao:int4wo-64"): True,
}


def test_pairs(tmp_path: Path) -> None:
    found = {(name, flag): ok for name, flag, _, ok, _ in flag_table.rows(tmp_path)}
    assert {pair: found[pair] for pair in PAIRS} == PAIRS


def test_the_bits_of_the_file_are_told_and_not_those_it_is_held_in(tmp_path: Path) -> None:
    for maker, quantization, words in (
        (tiny.gptq(3), c.gptq(3), "quantized already: gptq of 3 bits, held in 4: uint4, groups of 128"),
        (tiny.gptq(2), c.gptq(2), "quantized already: gptq of 2 bits, held in 4: uint4, groups of 128"),
    ):
        made = tiny.make(tmp_path, maker, quantization, num_hidden_layers=1, hidden_size=256)
        with pytest.raises(UnsupportedError, match=f"int4 asks for 4-bit integer weights.*{words}"):
            load(made.path, quantization="int4", device_put=keep_on_host)
    with pytest.raises(UnsupportedError, match="quantized already: gguf Q5_0: int8, groups of 32"):
        load(gguf_files.write(tmp_path / "m.gguf", "Q5_0"), quantization="int8", device_put=keep_on_host)


def test_w8a8_int8_keeps_the_ignore_list_and_takes_our_divisor(tmp_path: Path) -> None:
    """SGLang's w8a8_fp8 forgets the list."""
    ignored = "model.layers.0.mlp.down_proj"
    quantization = c.compressed(
        "int-quantized", c.weights(8, "int", "channel"), c.inputs("int"), ignore=["lm_head", ignored]
    )
    made = tiny.make(tmp_path, tiny.eight("int"), quantization, num_hidden_layers=1)
    for suffix in ("weight", "weight_scale"):
        del made.tensors[f"{ignored}.{suffix}"]
    made.tensors[f"{ignored}.weight"] = made.weights[ignored].astype(made.tensors["model.norm.weight"].dtype)
    made.save()
    plain, asked = (load(str(tmp_path), quantization=q, device_put=keep_on_host) for q in (None, "w8a8_int8"))
    layers = [x.params["layers"]["0"] for x in (plain, asked)]
    assert [layer["attn"]["o"]["weight"].spec.activation.divisor for layer in layers] == [127.5, 127.0]
    assert all(isinstance(layer["mlp"]["down"]["weight"], np.ndarray) for layer in layers)
    assert "absmax/127" in asked.plan.notes[0] and "ignore list kept" in asked.plan.notes[0]


def test_w8a8_int8_overrides_inputs_with_zero_points(tmp_path: Path) -> None:
    """Dynamic ones, of which the file stores nothing; the refusal without the flag names it."""
    inputs = {**c.inputs("int"), "symmetric": False}
    quantization = c.compressed("int-quantized", c.weights(8, "int", "channel"), inputs)
    path = tiny.make(tmp_path, tiny.eight("int"), quantization, num_hidden_layers=1).path
    with pytest.raises(UnsupportedError, match=r"symmetric: False is not supported.*--quantization w8a8_int8"):
        load(path, device_put=keep_on_host)
    with pytest.raises(UnsupportedError, match="symmetric"):
        load(path, quantization="torchao:int8dq", device_put=keep_on_host)
    weight = load(path, quantization="w8a8_int8", device_put=keep_on_host).params["layers"]["0"]["attn"]["o"]["weight"]
    assert (weight.spec.qtype, weight.spec.activation.divisor) == ("int8", 127.0)


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    with pytest.raises(UnsupportedError, match=r"int3: there is no such scheme.*fp8_block.*int4wo-128.*awq_marlin"):
        load(str(tmp_path), quantization="int3", device_put=keep_on_host)


@pytest.mark.parametrize("asked", ["torchao:fp8dq-per_tensor", "torchao:fp8dq-per_row", None])
def test_inputs_that_torchao_scales_otherwise_are_told(tmp_path: Path, asked: str | None) -> None:
    """In the row of the plan, stored or quantized while loading; not where no input is quantized."""
    name = "torchao fp8dq-per_tensor" if asked is None else "unquantized"
    made = tiny.make(tmp_path / "made", *flag_table.CHECKPOINTS[name], num_hidden_layers=1, hidden_size=256)
    said = asked != "torchao:fp8dq-per_row"
    store.convert(made.path, tmp_path / "store", quantization=asked)
    for path, quantization in ((made.path, asked), (tmp_path / "store", None)):
        plan = load(path, quantization=quantization, device_put=keep_on_host).plan
        (row,) = (row for row in plan.rows if row.path == "layers.0.attn.o")
        assert row.activation == "fp8 per token" + (" (torchao: per tensor)" if said else "")
        assert (" (torchao: per tensor)" in plan.to_text()) is said
        alone = load(path, quantization=quantization, activations="none", device_put=keep_on_host).plan
        assert "torchao: per tensor" not in alone.to_text()


NEAR = {
    "FP8": "--quantization fp8",
    "fp-8": "--quantization fp8",
    "awq-marlin": "--quantization awq_marlin",
    "int4_64": "--quantization int4-64",
    "nf4": "--quantization bitsandbytes",
    "bitsandbyte": "--quantization bitsandbytes",
    "int4wo-128": "--torchao-config int4wo-128",
    "torchao:fp8": "--quantization fp8",
    "torchao:fp8dq_per_row": "--torchao-config fp8dq-per_row",
    "squeezellm": None,
    "torchao:x": None,
}


@pytest.mark.parametrize("name", NEAR)
def test_a_misspelt_name_is_told_the_one_it_may_have_meant(name: str, tmp_path: Path) -> None:
    path = tiny.make(tmp_path, num_hidden_layers=1).path
    with pytest.raises(UnsupportedError) as refused:
        load(path, quantization=name, device_put=keep_on_host)
    meant = NEAR[name]
    assert (f"no such scheme (did you mean {meant}?); on" if meant else "no such scheme; on") in str(refused.value)
