"""The tokenizer that a GGUF file's fields make, beside the original's; and fields that make none."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from jqserve.checkpoint.gguf_file import GgufFile
from jqserve.checkpoint.gguf_tokenizer import write_tokenizer
from jqserve.errors import CheckpointError, UnsupportedError
from tests.checkpoint import gguf_files as g

TEXTS = ["What is 463 + 88?", "  two  spaces\n\nand lines\t", "naïve café 東京 🙂", "x" * 40, "", "</s> or <s> inside"]


def test_byte_level_tokenizer_is_that_of_the_model(demo_dir: Path, tmp_path: Path) -> None:
    """tokenizer.json -> the fields that llama.cpp's converter writes -> tokenizer.json again."""
    original = json.loads((demo_dir / "tokenizer.json").read_text())
    peer = Tokenizer.from_file(str(demo_dir / "tokenizer.json"))
    size = peer.get_vocab_size()
    tokens = [peer.id_to_token(i) for i in range(size)]
    added = {t["id"] for t in original["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in original["model"]["merges"]]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in added else 1 for i in range(size)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert write_tokenizer(GgufFile(g.write(tmp_path / "m.gguf", fields=fields)), tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = peer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).ids == [1, *ids]
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == peer.decode(ids)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """The algorithm of SentencePiece's BPE: merge the neighbours whose union has the best score, the leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
        if not pairs or max(pairs)[0] == -np.inf:
            return pieces
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def test_sentencepiece_tokenizer_follows_the_scores(tmp_path: Path) -> None:
    words = [
        "▁t",
        "he",
        "▁the",
        "th",
        "▁th",
        "in",
        "ing",
        "▁in",
        "er",
        "▁a",
        "an",
        "nd",
        "▁and",
        "▁▁",
        "ca",
        "cat",
        "at",
    ]
    letters = list("▁abcdefghinorst")
    control = ["<unk>", "<s>", "</s>"]
    byte = [f"<0x{i:02X}>" for i in range(256)]
    tokens = control + byte + words + letters
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1e3] * len(letters)
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    assert write_tokenizer(GgufFile(g.write(tmp_path / "m.gguf", fields=fields)), tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    by_score = dict(zip(tokens[259:], scores[259:]))
    for text in ("the cat in there", "and  another thing", "tteehh", "a"):
        found = ours.encode(text)
        assert found.tokens == ["<s>", *sentencepiece(text, by_score)]
        assert ours.decode(found.ids) == text
    assert ours.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]


def test_a_tokenizer_of_another_kind_is_named(tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(UnsupportedError, match=r"t5.*--tokenizer-path"):
        write_tokenizer(GgufFile(g.write(tmp_path / "m.gguf", fields=fields)), tmp_path)


BYTES = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"],
}
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a merge of no token": ({**BYTES, "tokenizer.ggml.merges": ["a b", "a c"]}, r"merges: found 'a c', expected pairs"),
    "a merge that makes no token": ({**BYTES, "tokenizer.ggml.merges": ["b a"]}, r"merges: found 'b a'"),
    "a merge of one": ({**BYTES, "tokenizer.ggml.merges": ["ab"]}, r"merges: found 'ab'"),
    "one type": ({**BYTES, "tokenizer.ggml.token_type": 1}, r"token_type: found int, expected 3 numbers"),
    "types of others": ({**BYTES, "tokenizer.ggml.token_type": [1, 1]}, r"token_type: found 2 entries, expected 3"),
    "scores in words": (
        {**PIECES, "tokenizer.ggml.scores": ["a", "b", "c"]},
        r"scores: found 3 entries, expected 3 num",
    ),
    "no scores": ({k: v for k, v in PIECES.items() if "scores" not in k}, r"scores: found nothing, expected 3 numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_fields_that_make_no_tokenizer_are_named(case: str, tmp_path: Path) -> None:
    fields, words = WRONG[case]
    with pytest.raises(CheckpointError, match=words):
        write_tokenizer(GgufFile(g.write(tmp_path / "m.gguf", fields=fields)), tmp_path)


@pytest.mark.parametrize(("pre", "words"), [(None, "pre is missing"), ("default", "pre is 'default'"), ("gpt-2", "")])
def test_an_unknown_way_to_cut_text_is_warned_of(
    pre: str | None, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {k: v for k, v in BYTES.items() if not k.endswith("pre")} | ({"tokenizer.ggml.pre": pre} if pre else {})
    assert write_tokenizer(GgufFile(g.write(tmp_path / "m.gguf", fields=fields)), tmp_path)
    assert words in caplog.text and ("--tokenizer-path" in caplog.text) == bool(words)
