"""Calibration data in all its forms, and what is said about data that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.llama8b import LLAMA_3_1_8B
from jqserve.checkpoint.model_config import model_config
from jqserve.errors import RequestError
from jqserve.quantize import block, calibration, moments
from jqserve.quantize.activations import Activations
from jqserve.quantize.calibration import read_calibration


class Letters:
    """A tokenizer: a character an id; a chat is its contents, each behind its role's first letter."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def need_chat(self) -> Letters:
        return self

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert not add_generation_prompt
        return "".join(m["role"][0] + m["content"] for m in messages)


def read(path: Path, samples: int = 99, seqlen: int = 4, **more: Any) -> np.ndarray:
    return read_calibration(path, samples, seqlen, 128, Letters, 0, **more)


def text(rows: np.ndarray) -> list[str]:
    return ["".join(map(chr, row)) for row in rows]


def test_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij")
    assert text(read(tmp_path / "a.txt")) == ["abcd", "efgh"]
    rows = [{"text": "xyz"}, {"text": ""}, {"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert text(read(tmp_path / "b.jsonl", seqlen=7)) == ["xyz\0uhi"]
    np.save(tmp_path / "c.npy", np.arange(12, dtype=np.int32).reshape(3, 4))
    assert np.array_equal(read(tmp_path / "c.npy"), np.arange(12).reshape(3, 4))
    assert text(read(tmp_path))[:3] == ["abcd", "efgh", "ij\0x"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Editors of Windows put it before everything."""
    (tmp_path / "a.txt").write_text("abcd", encoding="utf-8-sig")
    assert text(read(tmp_path / "a.txt")) == ["abcd"]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "wxyz"}), encoding="utf-8-sig")
    assert text(read(tmp_path / "b.jsonl")) == ["wxyz"]


def test_which_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.arange(100).repeat(4))
    path = tmp_path / "c.npy"
    assert read(path, 5)[:, 0].tolist() == [0, 25, 50, 74, 99]
    drawn = read(path, 5, seed=3)
    assert np.array_equal(drawn, read(path, 5, seed=3)) and not np.array_equal(drawn, read(path, 5, seed=4))
    assert len(set(drawn[:, 0].tolist())) == 5


def test_a_line_ends_with_a_newline_alone(tmp_path: Path) -> None:
    """json.dumps(..., ensure_ascii=False) leaves U+2028 and U+0085 as they are inside strings."""
    row = {"text": "a\x85b\x0cc\u2028d"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    documents = list(calibration._read(tmp_path / "b.jsonl", Letters))
    assert [list(map(chr, ids)) for ids in documents] == [list(row["text"])]


def test_a_chat_that_cannot_be_rendered_is_named(tmp_path: Path) -> None:
    class Strict(Letters):
        def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            raise RequestError("chat", "roles must alternate")

    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"messages": []}')
    with pytest.raises(RequestError, match=r"b\.jsonl, line 2: chat: roles must alternate"):
        read_calibration(tmp_path / "b.jsonl", 9, 4, 128, Strict, 0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"prompt": 3}', "line 2: expected"),
        ("x.jsonl", b"{", "line 1: not JSON"),
        ("x.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("x.jsonl", b'{"text": "abcd"}\n{"text": "\\ud83d abcd"}', "line 2: holds half of a surrogate pair"),
        ("x.txt", b"\xff\xfe\xfa", "cannot be read as text"),
        ("x.txt", b"ab", "holds 2 tokens, fewer than one row"),
        ("x.npy", b"nonsense", "is not a .npy of plain numbers"),
        ("x.txt", "ÿabcdef".encode(), "token id 255; the model has 0..127"),
    ],
)
def test_what_is_no_data(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=words.replace(".", "\\.")):
        read(tmp_path / name)


def test_missing_and_empty(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path, "has no file that ends in")):
        with pytest.raises(RequestError, match=words):
            read(path)
    np.save(tmp_path / "f.npy", np.ones(8))
    with pytest.raises(RequestError, match="expected ids"):
        read(tmp_path / "f.npy")
    np.save(tmp_path / "f.npy", np.ones(8, np.int32))
    with pytest.raises(RequestError, match=r"^--seed: must not be negative, found -1"):
        read(tmp_path / "f.npy", seed=-1)


def test_moments_do_not_depend_on_the_cut() -> None:
    """512 pieces or 4: sums are compensated, so what differs is the rounding inside a piece alone."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1, 2048, 16)) * 10.0 ** rng.integers(-3, 3, 16)).astype(np.float32)
    exact = x[0].astype(np.float64)
    for pieces in (512, 4):
        found = moments.start(16, hessian=True)
        for part in np.split(x, pieces, axis=1):
            found = moments.add(found, jnp.asarray(part))
        done = moments.finish(found, 2048.0)
        assert np.allclose(done["hessian"], exact.T @ exact / 2048, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
        assert np.allclose(done["mean"], np.abs(exact).mean(0), rtol=1e-6)
        assert np.array_equal(done["largest"], np.abs(x[0]).max(0))


def test_samples_are_spread_over_the_chunks() -> None:
    chunks = [np.full((2, 3, 1), i) + np.arange(2)[:, None, None] * 0.5 for i in range(4)]
    taken = Activations(chunks).sample(12)
    assert [chunk[:, 0, 0].tolist() for chunk in taken] == [[0.0, 1.0], [2.5, 3.5]]
    assert len(Activations(chunks).sample(1)) == 1


def test_pinned_chunks_are_the_same_chunks() -> None:
    """What a GPU does; a CPU's pinned memory is memory."""
    rng = np.random.default_rng(2)
    chunks = [rng.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(5)]
    pinned, plain = Activations(chunks, pinned=True), Activations(chunks, pinned=False)
    assert {chunk.sharding.memory_kind for chunk in pinned.chunks if isinstance(chunk, jax.Array)} == {"pinned_host"}
    assert {type(chunk) for chunk in plain.chunks} == {np.ndarray}
    for stream in (pinned, plain):
        assert stream.rows == 30
        stream.replace(lambda h: h * 2)
        assert all(np.array_equal(now, 2 * before) for now, before in zip(stream.chunks, chunks, strict=True))
        assert np.array_equal(stream.sample(9)[0][0], 2 * chunks[0][0])
    assert {chunk.sharding.memory_kind for chunk in pinned.chunks if isinstance(chunk, jax.Array)} == {"pinned_host"}


def test_samples_attend_alone_where_their_scores_would_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config(
        {**LLAMA_3_1_8B, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"head_dim": 16, "num_hidden_layers": 1, "vocab_size": 64}
    )
    rng = np.random.default_rng(3)
    weights = {"qkv": jnp.asarray(rng.standard_normal((128, 64)), jnp.float32) / 8}
    x = jnp.asarray(rng.standard_normal((3, 7, 64)), jnp.float32)
    together = block.attend(config, None, weights, x)
    monkeypatch.setattr(block, "MOST_SCORES", 0)
    alone = block.attend(config, None, weights, x)
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(alone, together))
