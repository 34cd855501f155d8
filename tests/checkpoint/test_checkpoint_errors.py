"""Damaged, incomplete and contradictory checkpoints: each error names the file, the tensor, and what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.errors import CheckpointError, JqserveError, UnsupportedError
from tests.checkpoint import configs as c
from tests.checkpoint import files, tiny
from tests.checkpoint.tiny import Tiny

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SINGLE = "model.safetensors"


def never(weight: Any) -> Any:
    raise AssertionError("a weight was placed although the headers show the fault")


def fails(
    path: Path, *words: str, kind: type[JqserveError] = CheckpointError, place: Any = never, **options: Any
) -> str:
    """Loading fails with `kind`, before anything is placed, and the message has all `words`."""
    with pytest.raises(kind) as caught:
        load(str(path), device_put=place, decode="host", **options)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message


def header_edit(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Tiny], None]:
    """Rewrites the header of the single shard; the data stay."""

    def apply(made: Tiny) -> None:
        path = made.path / SINGLE
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edited = edit(header)
        text = edited if isinstance(edited, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return apply


def cut(size: int) -> Callable[[Tiny], None]:
    def apply(made: Tiny) -> None:
        path = made.path / SINGLE
        data = path.read_bytes()
        path.write_bytes(data[:size])

    return apply


def rewrite(data: bytes) -> Callable[[Tiny], None]:
    return lambda made: (made.path / SINGLE).write_bytes(data) and None


NORM = "model.norm.weight"
FILES: dict[str, tuple[Callable[[Tiny], None], tuple[str, ...]]] = {
    "empty": (rewrite(b""), (SINGLE, "0 bytes")),
    "four bytes": (rewrite(b"abcd"), (SINGLE, "4 bytes")),
    "lfs pointer": (rewrite(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), (SINGLE, "git lfs pull")),
    "not safetensors": (rewrite(b"\x80\x02}q\x00(X" + b"x" * 100), (SINGLE, "not a safetensors file")),
    "cut in the header": (cut(100), (SINGLE, "truncated")),
    "cut in the data": (cut(50_000), (SINGLE, "truncated", "50000")),
    "grown": (lambda m: (m.path / SINGLE).open("ab").write(b"1234") and None, (SINGLE, "damaged")),
    "header is not JSON": (header_edit(lambda h: b"{" + b"x" * 500), (SINGLE, "damaged header")),
    "header is a list": (header_edit(lambda h: b"[1, 2]"), (SINGLE, "JSON object")),
    "header is not UTF-8": (header_edit(lambda h: b'{"\xff\xfe": 1}'), (SINGLE, "damaged header")),
    "header nests too deep": (header_edit(lambda h: b'{"a":' + b"[" * 100_000), (SINGLE, "damaged header")),
    "metadata is a list": (header_edit(lambda h: h.update(__metadata__=[])), (SINGLE, "__metadata__")),
    "entry without offsets": (header_edit(lambda h: h[NORM].pop("data_offsets")), (SINGLE, NORM, "data_offsets")),
    "offsets swapped": (header_edit(lambda h: h[NORM]["data_offsets"].reverse()), (SINGLE, NORM)),
    "offset is text": (header_edit(lambda h: h[NORM].update(data_offsets=["0", 1])), (SINGLE, NORM, "data_offsets")),
    "negative shape": (header_edit(lambda h: h[NORM].update(shape=[-128])), (SINGLE, NORM, "shape")),
    "shape is true": (header_edit(lambda h: h[NORM].update(shape=[True])), (SINGLE, NORM, "shape")),
    "shape too large": (header_edit(lambda h: h[NORM].update(shape=[1 << 62, 1 << 62])), (SINGLE, NORM, "bytes")),
    "overlap": (header_edit(lambda h: h[NORM].update(data_offsets=[0, 256])), (SINGLE, "overlaps")),
    "hole": (header_edit(lambda h: h.pop(f"{Q}.weight")), (SINGLE, "hole")),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_file(case: str, tmp_path: Path) -> None:
    damage, words = FILES[case]
    damage(tiny.make(tmp_path))
    fails(tmp_path, *words)


def test_unknown_dtype(tmp_path: Path) -> None:
    header_edit(lambda h: h[NORM].update(dtype="F4"))(tiny.make(tmp_path))
    fails(tmp_path, SINGLE, NORM, "F4", "BF16", kind=UnsupportedError)


def test_no_such_directory(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere", "not a directory")


def test_directory_without_config(tmp_path: Path) -> None:
    fails(tmp_path, "config.json", "missing")


def test_directory_without_weights(tmp_path: Path) -> None:
    (tiny.make(tmp_path).path / SINGLE).unlink()
    fails(tmp_path, "no .safetensors", "--load-format dummy")


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tiny.make(tmp_path).path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    fails(tmp_path, "pytorch_model.bin", "pickle", kind=UnsupportedError)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\xff", "{" * 100_000])
def test_config_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    (tiny.make(tmp_path).path / "config.json").write_bytes(text.encode("latin-1"))
    fails(tmp_path, "config.json")


def sharded(path: Path) -> dict[str, str]:
    """Splits the tiny checkpoint in two shards with an index; returns the weight map."""
    made = tiny.make(path)
    names = list(made.tensors)
    shards = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(names)}
    for shard in shards:
        files.write(path / shard, {n: t for n, t in made.tensors.items() if weight_map[n] == shard})
    (path / SINGLE).unlink()
    write_index(path, weight_map)
    return weight_map


def write_index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_load(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy of the weights, not in the index")
    assert set(load(str(tmp_path), device_put=keep_on_host).params) == {"embed", "layers", "final_norm"}


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    fails(tmp_path, "model-00002-of-00002.safetensors", "missing", "index.json")


def test_missing_shard_without_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    fails(tmp_path, "model-00001-of-00002.safetensors", "missing")


def test_index_that_points_elsewhere(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    write_index(tmp_path, {**weight_map, NORM: "../secret.safetensors"})
    fails(tmp_path, "index.json", NORM, "not a file name")
    shards = sorted(set(weight_map.values()))
    write_index(tmp_path, {**weight_map, NORM: shards[shards[0] == weight_map[NORM]]})
    fails(tmp_path, "index.json", NORM, "does not hold it")
    write_index(tmp_path, [1, 2])
    fails(tmp_path, "weight_map")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    for shard in set(weight_map.values()):
        tensors = files.read(tmp_path / shard)
        files.write(tmp_path / shard, {**tensors, "twice": np.zeros(1, np.float32)})
    fails(tmp_path, "'twice'", "is in both")


def bf16(*shape: int) -> np.ndarray:
    return np.ones(shape, ml_dtypes.bfloat16)


GPTQ, AWQ = (tiny.gptq(), c.gptq()), (tiny.awq(), c.awq())
PACKED = (tiny.packed(), c.compressed("pack-quantized", c.weights(4, "int", "group", 128)))
FP8 = (tiny.eight(), c.compressed("float-quantized", c.weights(8, "float", "channel"), c.inputs("float")))
STATIC = (
    tiny.eight(shape="tensor", static=True),
    c.compressed("float-quantized", c.weights(8, "float", "tensor"), c.inputs("float", static=True)),
)
Change = Callable[[dict[str, np.ndarray]], Any]
TENSORS: dict[str, tuple[Any, Change, tuple[str, ...]]] = {
    "missing norm": (None, lambda t: t.pop(NORM), (NORM, "missing")),
    "missing linear": (None, lambda t: t.pop(f"{DOWN}.weight"), (DOWN, "no tensor")),
    "wrong shape": (None, lambda t: t.update({NORM: bf16(64)}), (NORM, "[64]", "[128]")),
    "transposed": (None, lambda t: t.update({f"{DOWN}.weight": bf16(256, 128)}), (DOWN, "[256, 128]", "[128, 256]")),
    "wrong dtype": (None, lambda t: t.update({NORM: np.ones(128, np.int32)}), (NORM, "I32", "BF16")),
    "unknown tensor": (None, lambda t: t.update({f"{Q}.lora_A.weight": bf16(2, 2)}), ("lora_A", "belong to no module")),
    "unknown vision tower": (None, lambda t: t.update({"visual.x": bf16(2)}), ("visual.x", "belong to no module")),
    "layer too many": (
        None,
        lambda t: t.update({"model.layers.2.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}),
        ("model.layers.2", "2 layers"),
    ),
    "bias that is not zero": (None, lambda t: t.update({f"{Q}.bias": bf16(128)}), (f"{Q}.bias", "not zero")),
    "head that differs": (None, lambda t: t.update({"lm_head.weight": bf16(64, 128)}), ("lm_head.weight", "differs")),
    "gptq without scales": (GPTQ, lambda t: t.pop(f"{Q}.scales"), (Q, "scales", "gptq")),
    "gptq dense module": (
        GPTQ,
        lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)] and t.update({f"{Q}.weight": bf16(128, 128)}),
        (Q, "gptq", "weight BF16", "agree"),
    ),
    "gptq and dense weight": (GPTQ, lambda t: t.update({f"{Q}.weight": bf16(128, 128)}), (Q, "gptq", "weight BF16")),
    "gptq scales of another group": (
        GPTQ,
        lambda t: t.update({f"{DOWN}.scales": np.ones((4, 128), np.float16)}),
        (f"{DOWN}.scales", "[4, 128]", "[2, 128]"),
    ),
    "awq packed like gptq": (
        AWQ,
        lambda t: t.update({f"{Q}.qweight": np.zeros((16, 128), np.int32)}),
        (f"{Q}.qweight", "[16, 128]", "[128, 16]"),
    ),
    "fp8 as int8": (FP8, lambda t: t.update({f"{Q}.weight": np.ones((128, 128), np.int8)}), (Q, "I8", "F8_E4M3")),
    "packed without shape": (PACKED, lambda t: t.pop(f"{Q}.weight_shape"), (Q, "weight_shape")),
    "zero points of a symmetric file": (
        PACKED,
        lambda t: t.update({f"{Q}.weight_zero_point": np.zeros((16, 1), np.int32)}),
        ("weight_zero_point", "belong to no module"),
    ),
    "stray input scale": (FP8, lambda t: t.update({f"{Q}.input_scale": bf16(1)}), ("input_scale", "no module")),
    "static without input scale": (STATIC, lambda t: t.pop(f"{Q}.input_scale"), (Q, "input_scale")),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_and_config_disagree(case: str, tmp_path: Path) -> None:
    scheme, change, words = TENSORS[case]
    made = tiny.make(tmp_path, *(scheme or ()))
    change(made.tensors)
    fails(made.save().path, *words)


def g_idx(values: np.ndarray) -> Change:
    return lambda t: t.update({f"{Q}.g_idx": values.astype(np.int32)})


def poke(name: str, value: float) -> Change:
    def change(t: dict[str, np.ndarray]) -> None:
        t[name] = t[name].copy()
        t[name].reshape(-1)[0] = value

    return change


VALUES: dict[str, tuple[Any, Change, tuple[str, ...]]] = {
    "group index out of range": (GPTQ, g_idx(np.full(128, 7)), (f"{Q}.g_idx", "7", "0 to 0")),
    "negative group index": (GPTQ, g_idx(np.arange(128) - 1), (f"{Q}.g_idx", "-1")),
    "scale is NaN": (GPTQ, poke(f"{Q}.scales", np.nan), (f"{Q}.scales", "finite")),
    "awq scale is inf": (AWQ, poke(f"{DOWN}.scales", np.inf), (f"{DOWN}.scales", "finite")),
    "packed scale is NaN": (PACKED, poke(f"{Q}.weight_scale", np.nan), (f"{Q}.weight_scale", "finite")),
    "weight_shape of another matrix": (PACKED, poke(f"{Q}.weight_shape", 64), (f"{Q}.weight_shape", "[64, 128]")),
    "fp8 NaN": (FP8, poke(f"{Q}.weight", np.nan), ("layers.0.attn.qkv", "finite")),
    "bf16 NaN": (None, poke(f"{DOWN}.weight", np.nan), ("layers.1.mlp.down", "finite")),
    "norm inf": (None, poke(NORM, np.inf), (NORM, "finite")),
    "input scale 0": (STATIC, poke(f"{Q}.input_scale", 0), (f"{Q}.input_scale", "positive")),
    "sym, but the zeros are not 8": (GPTQ, poke(f"{Q}.qzeros", 0x77777778), (f"{Q}.qzeros", "sym", "one is 9")),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_no_tool_writes(case: str, tmp_path: Path) -> None:
    scheme, change, words = VALUES[case]
    made = tiny.make(tmp_path, *(scheme or ()))
    change(made.tensors)
    fails(made.save().path, *words, place=keep_on_host)


def test_act_order_groups_of_unequal_size(tmp_path: Path) -> None:
    made = tiny.make(tmp_path, tiny.gptq(4, 64, desc_act=True), c.gptq(4, 64, desc_act=True))
    made.tensors[f"{Q}.g_idx"] = np.array([0] * 100 + [1] * 28, np.int32)
    fails(made.save().path, f"{Q}.g_idx", "64 columns", place=keep_on_host)


def test_float16_that_overflows(tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    poke(NORM, 1e5)(made.tensors)
    made.save()
    fails(tmp_path, NORM, "float16", "--dtype bfloat16", place=keep_on_host, dtype="float16")
    assert load(str(tmp_path), device_put=keep_on_host).config.dtype == "bfloat16"


def test_v2_zeros_read_as_v1(tmp_path: Path) -> None:
    tiny.make(tmp_path, tiny.gptq(v2=True), c.gptq())
    fails(tmp_path, "qzeros", "checkpoint_format", place=keep_on_host)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    made = tiny.make(tmp_path)

    def shrink(weight: Any) -> Any:
        with (made.path / SINGLE).open("r+b") as file:
            file.truncate(20_000)
        return weight

    fails(tmp_path, SINGLE, "shrank", place=shrink)


def test_quantize_config_beside_it_says_otherwise(fixtures_dir: Path, tmp_path: Path) -> None:
    made = tiny.make(tmp_path, *GPTQ)
    (tmp_path / "quantize_config.json").write_text(json.dumps({**c.gptq(), "checkpoint_format": "gptq_v2"}))
    fails(made.path, "checkpoint_format", "quantize_config.json", "gptq_v2")


def test_unreadable_directory_entry(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).mkdir()
    fails(tmp_path, ".safetensors")
    shutil.rmtree(tmp_path / SINGLE)


def test_half_types_are_not_mixed(tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    made.tensors[NORM] = made.tensors[NORM].view(np.float16)
    fails(made.save().path, f"{NORM} is F16", "is BF16")


def test_float32_norms_beside_bf16_are_fine(tmp_path: Path) -> None:
    made = tiny.make(tmp_path)
    made.tensors[NORM] = made.tensors[NORM].astype(np.float32)
    made.tensors[f"{Q}.weight"] = made.tensors[f"{Q}.weight"].astype(np.float32)
    for options in ({}, {"quantization": "fp8"}):
        load(str(made.save().path), device_put=keep_on_host, **options)


def test_a_module_that_only_the_config_leaves_dense_is_told_which_line_says_so(tmp_path: Path) -> None:
    """An ignore list that names too much is found by its entry, not by a dtype."""
    quantization = c.compressed(
        "float-quantized", c.weights(8, "float", "channel"), c.inputs("float"), ignore=["lm_head", r"re:.*\.q_proj$"]
    )
    made = tiny.make(tmp_path, tiny.eight(), quantization, num_hidden_layers=1)
    with pytest.raises(CheckpointError) as refused:
        load(made.path)
    assert (
        "self_attn.q_proj: config.json makes this module dense (ignore has 're:.*\\\\.q_proj$'), which has a float"
        in str(refused.value)
    )
    assert "the file has weight F8_E4M3, weight_scale BF16. Config and tensors must agree" in str(refused.value)
    made.config.pop("quantization_config")
    made.save()
    with pytest.raises(CheckpointError, match=r"dense \(the checkpoint is not quantized\).*has weight F8_E4M3"):
        load(made.path)


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (1e5, "float16", r"too narrow for it \(then try --dtype bfloat16\)"),
        (3.4e38, "bfloat16", r"too narrow for it \(then try --dtype float32\)"),
        (np.nan, "float32", "the file is damaged$"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_value_that_the_dtype_does_not_hold(value: float, dtype: str, says: str, tmp_path: Path) -> None:
    """By our error alone, and with a dtype that helps."""
    made = tiny.make(tmp_path, num_hidden_layers=1)
    made.tensors["model.norm.weight"] = np.full(128, value, np.float32)
    made.save()
    with pytest.raises(
        CheckpointError, match=rf"model\.norm\.weight: has values that are not finite in {dtype}.*{says}"
    ):
        load(made.path, dtype=dtype, device_put=keep_on_host)
