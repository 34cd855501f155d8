"""Text from tokens a few at a time: whole characters only, and joined the decoded whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from jqserve.server.detokenize import Detokenizer

PIECES = ("grün ", "😀", "€ ", "hello ", "\n\n", "  x", "日本", "ﬀ", "👩‍👩‍👧 ", "The", " cat")


@pytest.fixture(scope="module")
def byte_level(demo_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As SentencePiece models have it: a space is ▁, the first of a text is dropped, unknown characters are bytes."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁hello", "▁cat", "s", "ü", "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def feed(detokenizer: Detokenizer, ids: list[int], rng: random.Random) -> list[str]:
    pieces, at = [], 0
    while at < len(ids):
        size = rng.choice((1, 1, 1, 2, 4))
        pieces.append(detokenizer.feed(ids[at : at + size]))
        at += size
    return pieces


@pytest.mark.parametrize("seed", range(30))
def test_real_text(byte_level: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(PIECES) for _ in range(20))
    ids = byte_level.encode(text, add_special_tokens=False).ids
    pieces = feed(Detokenizer(byte_level.decode), ids, rng)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(30))
def test_any_tokens(byte_level: Tokenizer, seed: int) -> None:
    """Random ids: broken bytes in the middle decode as they do; an unfinished character at the end is not emitted."""
    rng = random.Random(seed)
    ids = [rng.randrange(4096) for _ in range(80)]
    pieces = feed(Detokenizer(byte_level.decode), ids, rng)
    assert "".join(pieces).rstrip("\ufffd") == byte_level.decode(ids).rstrip("\ufffd")


def sentencepiece(tokenizer: Tokenizer, *words: str) -> list[int]:
    ids = []
    for word in words:
        token = tokenizer.token_to_id(word)
        ids += [token] if token is not None else [tokenizer.token_to_id(f"<0x{b:02X}>") for b in word.encode()]
    return ids


def test_byte_fallback(byte_fallback: Tokenizer) -> None:
    ids = sentencepiece(byte_fallback, "▁hello", "s", "▁", "😀", "€", "▁cat", "ü", "日")
    detokenizer = Detokenizer(byte_fallback.decode)
    pieces = [detokenizer.feed([i]) for i in ids]
    assert "".join(pieces) == "hellos 😀€ catü日" and not any("\ufffd" in piece for piece in pieces)


def test_the_space_after_the_prompt_is_kept(byte_fallback: Tokenizer) -> None:
    prompt, answer = (sentencepiece(byte_fallback, w) for w in ("▁hello", "▁cat"))
    assert Detokenizer(byte_fallback.decode, prompt).feed(answer) == " cat"
    assert Detokenizer(byte_fallback.decode).feed(answer) == "cat"


def test_skipped_special_tokens_do_not_cost_the_next_space(byte_fallback: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_fallback.decode)
    ids = sentencepiece(byte_fallback, "▁hello", "<eos>", "▁cat")
    assert [detokenizer.feed([i]) for i in ids] == ["hello", "", " cat"]


def test_a_character_split_between_prompt_and_answer_comes_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("x 😀", add_special_tokens=False).ids
    assert byte_level.decode(ids[:-1]).endswith("\ufffd")
    assert Detokenizer(byte_level.decode, ids[:-1]).feed(ids[-1:]) == "😀"


@pytest.mark.parametrize("which", ["byte_level", "byte_fallback"])
def test_endless_broken_bytes_cost_bounded_work(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    sizes: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return str(tokenizer.decode(ids))

    name = "<0xFF>" if which == "byte_fallback" else chr(0x100 + 0x21 + 94)  # some byte of no character
    broken = tokenizer.token_to_id(name) or next(i for i in range(4096) if tokenizer.decode([i]) == "\ufffd")
    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.feed([broken]) for _ in range(300))
    assert len(text) >= 280 and set(text) == {"\ufffd"}
    assert max(sizes) <= 70
