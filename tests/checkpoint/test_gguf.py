"""GGUF: every block type against the gguf package, whole files, rows of q and k, and damage."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from jqserve.checkpoint import store
from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.checkpoint.gguf_file import GgufFile, gguf_of
from jqserve.checkpoint.gguf_tokenizer import write_tokenizer
from jqserve.checkpoint.open import open_checkpoint
from jqserve.checkpoint.readers.gguf import DECODERS, Gguf, dequantized
from jqserve.errors import CheckpointError, JqserveError, UnsupportedError
from jqserve.quant import QuantizedTensor, dequantize
from tests.checkpoint import gguf_files as g

BLOCKS = Path(__file__).parents[1] / "data" / "gguf_blocks" / "blocks.npz"


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("kind", DECODERS)
def test_blocks_as_the_gguf_package_decodes_them(kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a few units of the last place: d * (sc * q) - m there, (q - 8) * (d * sc) + (8 * d * sc - m) here."""
    peers = np.load(BLOCKS)
    raw, expected = peers[f"{kind}/raw"], peers[f"{kind}/value"]
    scheme, (n, k) = Gguf(kind), expected.shape
    decode = lambda blocks: scheme.decode({"blocks": blocks}, n, k)  # noqa: E731
    qvalue, scale, zero = decode(raw) if where == "host" else jax.jit(decode)(jnp.asarray(raw))
    spec = scheme.spec(n, k)
    assert scale.shape == spec.grid and qvalue.shape == (n, spec.row_bytes)
    assert str(jnp.dtype(scale.dtype)) == scheme.scale_dtype({})
    tensor = QuantizedTensor(*(None if x is None else jnp.asarray(x) for x in (qvalue, scale, zero)), None, None, spec)
    np.testing.assert_allclose(dequantize(tensor), expected, rtol=0, atol=4e-6 * np.abs(expected).max())
    for rows in (n, 3):  # at once
        monkeypatch.setattr("jqserve.checkpoint.readers.gguf.DEQUANTIZED_AT_ONCE", rows * k)
        np.testing.assert_allclose(dequantized(kind, raw, n, k), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row (head, i, half) of llama.cpp's order is row (head, half, i) of transformers'."""
    size = len(rows) // heads
    order = [h * size + 2 * (r % (size // 2)) + r // (size // 2) for h in range(heads) for r in range(size)]
    return rows[order]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_file_becomes_a_model(architecture: str, tmp_path: Path) -> None:
    fields = {k.replace("llama.", f"{architecture}."): v for k, v in g.FIELDS.items()}
    tensors = g.model("Q4_K")
    if architecture == "qwen2":
        rng = np.random.default_rng(1)
        sizes = {"q": g.HIDDEN, "k": 128, "v": 128}
        tensors |= {f"blk.0.attn_{x}.bias": g.floats(rng, n) for x, n in sizes.items()}
    path = tmp_path / "m.gguf"
    path.write_bytes(g.pack({**fields, "general.architecture": architecture}, tensors))
    loaded = load(path, dtype="float32", device_put=keep_on_host)
    assert loaded.config.model_type == architecture and loaded.config.tied_embeddings and loaded.config.head_dim == 64
    kind, (n, k), data = tensors["blk.0.attn_q.weight"]
    q = dequantized(kind, np.frombuffer(data, np.uint8), n, k)
    q = unpaired(q, g.HEADS) if architecture == "llama" else q
    attn = jax.tree.map(jnp.asarray, loaded.params["layers"]["0"]["attn"])
    np.testing.assert_allclose(dequantize(attn["qkv"]["weight"])[:n], q, atol=4e-6 * np.abs(q).max())
    assert ("bias" in attn["qkv"]) == (architecture == "qwen2")
    row = next(row for row in loaded.plan.rows if row.path == "layers.0.mlp.down")
    assert loaded.plan.method == "gguf" and row.scheme == "gguf Q4_K: uint4, groups of 32, offsets"
    store.convert(path, tmp_path / "out", dtype="float32")
    again = load(tmp_path / "out", dtype="float32", device_put=keep_on_host)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*(jax.tree.leaves(x.params) for x in (loaded, again))))


def test_a_directory_with_one_file_and_a_quantized_embedding_and_head(tmp_path: Path) -> None:
    embedding = ("Q8_0", (g.VOCAB, g.HIDDEN), g.model("Q8_0")["blk.0.attn_q.weight"][2][: g.VOCAB * 8 * 34])
    head = ("Q6_K", (g.VOCAB, g.HIDDEN), g.model("Q6_K")["blk.0.attn_q.weight"][2][: g.VOCAB * 210])
    g.write(tmp_path / "m.gguf", "Q4_0", **{"token_embd.weight": embedding, "output.weight": head})
    loaded = load(tmp_path, device_put=keep_on_host)
    expected = dequantized("Q8_0", np.frombuffer(embedding[2], np.uint8), g.VOCAB, g.HIDDEN)
    np.testing.assert_array_equal(
        loaded.params["embed"]["weight"], expected.astype(loaded.params["embed"]["weight"].dtype)
    )
    assert loaded.config.dtype == "bfloat16" and loaded.params["lm_head"]["weight"].spec.qtype == "int8"
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match=r"several \.gguf files"):
        gguf_of(tmp_path)


def test_llama3_rope_from_its_factors(tmp_path: Path) -> None:
    """The factors of Llama 3.1 (transformers' formula), and others, which are refused."""
    frequency = 5e5 ** -(np.arange(0, 64, 2) / 64)
    turns = 8192 * frequency / (2 * np.pi)
    keep = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / (keep + (1 - keep) / 8)).astype(np.float32)
    fields = {"llama.rope.freq_base": 5e5}
    path = g.write(tmp_path / "m.gguf", fields=fields, **{"rope_freqs.weight": ("F32", (32,), factors.tobytes())})
    rope = load(path, device_put=keep_on_host).config.rope
    assert (rope.kind, rope.factor, rope.original_max_position, rope.theta) == ("llama3", 8.0, 8192, 5e5)
    g.write(path, fields=fields, **{"rope_freqs.weight": ("F32", (32,), (factors * 1.5).tobytes())})
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        load(path)


def test_biases_of_a_llama(tmp_path: Path) -> None:
    """No field tells of them, their tensors do; those of q and k are in llama.cpp's order of rows, as the weights."""
    rng = np.random.default_rng(2)
    attn = {"q": g.HIDDEN, "k": 128, "v": 128, "output": g.HIDDEN}
    mlp = {"gate": g.FFN, "up": g.FFN, "down": g.HIDDEN}
    tensors = {f"blk.0.attn_{x}.bias": g.floats(rng, n) for x, n in attn.items()}
    tensors |= {f"blk.0.ffn_{x}.bias": g.floats(rng, n) for x, n in mlp.items()}
    loaded = load(g.write(tmp_path / "m.gguf", **tensors), dtype="float32", device_put=keep_on_host)
    value = {name: np.frombuffer(data, np.float32) for name, (_, _, data) in tensors.items()}
    q, k = (unpaired(value[f"blk.0.attn_{x}.bias"], heads) for x, heads in (("q", g.HEADS), ("k", g.KV)))
    layer = loaded.params["layers"]["0"]
    np.testing.assert_array_equal(layer["attn"]["qkv"]["bias"], np.concatenate([q, k, value["blk.0.attn_v.bias"]]))
    np.testing.assert_array_equal(layer["attn"]["o"]["bias"], value["blk.0.attn_output.bias"])
    both = [value["blk.0.ffn_gate.bias"], value["blk.0.ffn_up.bias"]]
    np.testing.assert_array_equal(layer["mlp"]["gate_up"]["bias"], np.concatenate(both))
    np.testing.assert_array_equal(layer["mlp"]["down"]["bias"], value["blk.0.ffn_down.bias"])


SCALINGS: dict[str, tuple[dict[str, Any], tuple[str, float]]] = {
    "nothing": ({}, ("default", 1.0)),
    "a type and its factor": ({"scaling.type": "linear", "scaling.factor": 4.0}, ("linear", 4.0)),
    "a factor alone": ({"scaling.factor": 4.0}, ("linear", 4.0)),
    "an early file": ({"scale_linear": 4.0}, ("linear", 4.0)),
    "none, whatever the factor": ({"scaling.type": "none", "scaling.factor": 4.0}, ("default", 1.0)),
    "a factor of one": ({"scaling.factor": 1.0}, ("default", 1.0)),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling_as_llama_cpp_reads_it(case: str, tmp_path: Path) -> None:
    fields, expected = SCALINGS[case]
    path = g.write(tmp_path / "m.gguf", fields={f"llama.rope.{key}": value for key, value in fields.items()})
    rope = load(path, device_put=keep_on_host).config.rope
    assert (rope.kind, rope.factor) == expected


def test_yarn_with_borders_of_its_own(tmp_path: Path) -> None:
    """They are fields like any: dropped, every angle between would be another."""
    fields = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 64,
        "yarn_beta_fast": 16.0,
        "yarn_beta_slow": 2.0,
    }
    path = g.write(tmp_path / "m.gguf", fields={f"llama.rope.scaling.{key}": value for key, value in fields.items()})
    rope = load(path, device_put=keep_on_host).config.rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("yarn", 4.0, 64)
    assert dict(rope.extra) == {"beta_fast": 16.0, "beta_slow": 2.0}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, g.Tensor], type[JqserveError], str]] = {
    "architecture": ({"general.architecture": "mamba"}, {}, UnsupportedError, "mamba.*llama, qwen2"),
    "experts": ({"llama.expert_count": 8}, {}, UnsupportedError, "expert_count"),
    "a field that is text": ({"llama.block_count": "1"}, {}, CheckpointError, "block_count.*integer"),
    "an end that is a list": ({"tokenizer.ggml.eos_token_id": [1]}, {}, CheckpointError, r"eos_token_id: found \[1\]"),
    "an end of a turn that is text": (
        {"tokenizer.ggml.eot_token_id": "x"},
        {},
        CheckpointError,
        "eot_token_id: found 'x', expected an integer",
    ),
    "a layer more": ({"llama.block_count": 2}, {}, CheckpointError, r"layers\.1.*missing"),
    "a tensor that nobody knows": (
        {},
        {"blk.0.x.weight": ("F32", (4,), bytes(16))},
        CheckpointError,
        r"gguf\.blk\.0\.x",
    ),
    "a wrong shape": (
        {},
        {"blk.0.attn_norm.weight": ("F32", (4,), bytes(16))},
        CheckpointError,
        r"\[4\] found, \[256\]",
    ),
    "one of several parts": ({"split.count": 2}, {}, UnsupportedError, "split.count.*gguf-split --merge"),
    "a type that is not read": (
        {},
        {"blk.0.attn_q.weight": ("IQ4_XS", (g.HIDDEN, g.HIDDEN), bytes(g.HIDDEN * 136))},
        UnsupportedError,
        "IQ4_XS; supported.*Q4_K.*llama-quantize",
    ),
    "two scalings of rope": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        {"rope_freqs.weight": ("F32", (32,), bytes(128))},
        UnsupportedError,
        "scaling.type.*yarn.*none beside rope_freqs",
    ),
    "a yarn of its own": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.yarn_attn_factor": 0.5,
        },
        {},
        UnsupportedError,
        "yarn_attn_factor: 0.5.*usual",
    ),
    "a scaling without its factor": (
        {"llama.rope.scaling.type": "yarn"},
        {},
        CheckpointError,
        "scaling.factor: found nothing.*yarn",
    ),
    "biases in q, k and v alone": (
        {},
        {f"blk.0.attn_{x}.bias": ("F32", (n,), bytes(4 * n)) for x, n in (("q", 256), ("k", 128), ("v", 128))},
        UnsupportedError,
        "k_proj, q_proj, v_proj have a bias, o_proj none.*all of them or none",
    ),
    "half a head": ({"llama.rope.dimension_count": 32}, {}, UnsupportedError, "dimension_count"),
}


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_file_of_floats_is_quantized_while_loading(kind: str, tmp_path: Path) -> None:
    """It is not "quantized already"; what it is says the plan, and a calibrated scheme wants a directory."""
    path = g.write(tmp_path / "model.gguf", kind)
    plain, quantized = (load(path, device_put=keep_on_host, quantization=q) for q in (None, "int8"))
    for group in ("qkv", "o"):
        weight = plain.params["layers"]["0"]["attn"][group]["weight"]
        found = quantized.params["layers"]["0"]["attn"][group]["weight"]
        assert isinstance(found, QuantizedTensor) and not isinstance(weight, QuantizedTensor)
        np.testing.assert_allclose(dequantize(found), weight.astype(np.float32), atol=np.abs(weight).max() / 127)
    with pytest.raises(UnsupportedError, match="not quantized; awq is calibrated on the weights of a Hugging Face"):
        load(path, device_put=keep_on_host, quantization="awq")


def test_a_file_without_a_tokenizer_takes_the_ends_of_the_one_beside(tmp_path: Path) -> None:
    """Without them no answer would end; and a converted model keeps that tokenizer."""
    g.write(tmp_path / "model.gguf", "Q4_0")
    assert load(tmp_path / "model.gguf", device_put=keep_on_host).config.eos_token_ids == ()
    added = [{"id": 1, "content": "<|bos|>"}, {"id": 2, "content": "<|end|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    named = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    config = load(tmp_path / "model.gguf", device_put=keep_on_host).config
    assert config.eos_token_ids == (2,) and config.bos_token_id == 1
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        (tmp_path / "out").mkdir()
        checkpoint.copy_side_files(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"added_tokens": added}


ENDS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "eos alone": ({}, (1,)),
    "the end of a turn by its field": ({"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 1}, (1, 5)),
    "by its name": ({"tokenizer.ggml.tokens": ["a", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"]}, (1, 2)),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_answer_ends_where_llama_cpp_ends_it(case: str, tmp_path: Path) -> None:
    """Llama 3's eos is the end of a text, an answer's end another token; what is no control token is text."""
    more, expected = ENDS[case]
    kinds = {"tokenizer.ggml.token_type": [1, 3, 3, 1]} if "tokenizer.ggml.tokens" in more else {}
    path = g.write(tmp_path / "m.gguf", fields={"tokenizer.ggml.eos_token_id": 1, **kinds, **more})
    assert load(path, device_put=keep_on_host).config.eos_token_ids == expected


BOS = {("llama-bpe", None): True, ("llama-bpe", False): False, ("qwen2", None): False, ("qwen2", True): True}


@pytest.mark.parametrize(("pre", "asked"), BOS)
def test_a_bos_where_llama_cpp_puts_one(pre: str, asked: bool | None, tmp_path: Path) -> None:
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "<|begin_of_text|>"],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.bos_token_id": 1,
    }
    if asked is not None:
        fields["tokenizer.ggml.add_bos_token"] = asked
    assert write_tokenizer(GgufFile(g.write(tmp_path / "m.gguf", fields=fields)), tmp_path)
    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a").ids
    assert found == ([1, 0] if BOS[pre, asked] else [0])


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    fields, tensors, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        load(g.write(tmp_path / "m.gguf", fields=fields, **tensors), device_put=keep_on_host)


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Bits flipped in the header, files cut: an error of ours, or the model, never anything else."""
    path = g.write(tmp_path / "m.gguf")
    data = path.read_bytes()
    head = len(data) - sum(len(t[2]) for t in g.model("Q4_0").values())
    for seed in range(60):
        rng, damaged = random.Random(seed), bytearray(data)
        if seed % 4 == 0:
            damaged = damaged[: rng.randrange(len(damaged))]
        else:
            damaged[rng.randrange(head)] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        try:
            load(path, device_put=keep_on_host)
        except JqserveError as error:
            assert str(path) in str(error) or "model." in str(error), (seed, error)


def test_a_vocabulary_of_several_reads(tmp_path: Path) -> None:
    """2.5 MB of strings, some of them empty and one longer than what is read at once, and a field behind them."""
    rng = random.Random(0)
    tokens = ["".join(rng.choices("aé▁中", k=rng.randrange(12))) for _ in range(100_000)]
    tokens[70_000] = "x" * 1_500_000
    path = g.write(tmp_path / "m.gguf", fields={"tokenizer.ggml.tokens": tokens, "behind": 7})
    fields = GgufFile(path).fields
    assert fields["tokenizer.ggml.tokens"] == tokens and fields["behind"] == 7
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(CheckpointError, match="damaged GGUF header at byte"):
        GgufFile(path)


def test_lengths_beyond_the_file_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for body in (b"\xff" * 40, b"\x00" * 8 + b"\xff" * 8, (1).to_bytes(8, "little") + (1 << 60).to_bytes(8, "little")):
        path.write_bytes(b"GGUF\x03\x00\x00\x00" + body)
        with pytest.raises(CheckpointError):
            GgufFile(path)
    path.write_bytes(b"GGUF\x04\x00\x00\x00" + bytes(16))
    with pytest.raises(UnsupportedError, match="version 4"):
        GgufFile(path)
