"""tokenizer.json and tokenizer_config.json from a GGUF's own fields (transformers' loader would need torch).

Two kinds (`tokenizer.ggml.model`): "gpt2", byte-level BPE with the file's merges; "llama", SentencePiece BPE, whose
merges follow from the scores: of all ways to cut a piece into two pieces, the better piece first.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.gguf_config import CONTROL
from jqserve.checkpoint.gguf_file import GgufFile
from jqserve.errors import CheckpointError, UnsupportedError

log = logging.getLogger(__name__)

P = "tokenizer.ggml."
#: llama.cpp's token types.
UNKNOWN, USER_DEFINED, BYTE = 2, 4, 6
#: tokenizer.ggml.pre -> how text is cut before merging (the models' own tokenizer.json has these).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE: dict[str, str | None] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "default": None,  # GPT-2's own
    "gpt-2": None,
}


def has_tokenizer(file: GgufFile) -> bool:
    return f"{P}tokens" in file.fields


def tokenizer_folder(path: Path) -> str:
    """A directory with the tokenizer of the .gguf file `path`: made from its fields, until this process ends; or the
    file's own directory, where that has a tokenizer.json. Raises CheckpointError when neither has one."""
    file = GgufFile(path)
    try:
        if has_tokenizer(file):
            out = tempfile.mkdtemp(prefix="jqserve-tokenizer-")
            atexit.register(shutil.rmtree, out, ignore_errors=True)
            write_tokenizer(file, Path(out))
            return out
    finally:
        file.close()
    if (path.parent / "tokenizer.json").is_file():
        return str(path.parent)
    raise CheckpointError(
        f"{path}: holds no tokenizer, and there is no tokenizer.json beside it; name one with --tokenizer-path"
    )


def special_ids_beside(path: Path) -> dict[str, int]:
    """{"bos_token_id": ..., "eos_token_id": ...} of the tokenizer beside the .gguf file `path`, as far as its files
    name them: without an eos, no answer would ever end."""
    try:
        names = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
        added = json.loads((path.parent / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        ids = {token["content"]: int(token["id"]) for token in added}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found: dict[str, int] = {}
    for kind in ("bos", "eos"):
        token = names.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            found[f"{kind}_token_id"] = ids[token]
    return found


def write_tokenizer(file: GgufFile, out: Path) -> bool:
    """Writes both files into the directory `out`; False when the GGUF has no tokenizer.

    Raises UnsupportedError for a kind that is not built, CheckpointError for fields that contradict each other.
    """
    if not has_tokenizer(file):
        return False
    fields = Fields(dict(file.fields), str(file.path))
    tokens = fields.texts(f"{P}tokens")
    if not tokens:
        raise fields.error(f"{P}tokens", "at least one token")
    kinds = _numbers(fields, "token_type", len(tokens)) or [1] * len(tokens)
    model = fields.text(f"{P}model")
    if model not in ("gpt2", "llama"):
        raise fields.unsupported(f"{P}model", "gpt2, llama; name another tokenizer with --tokenizer-path")
    built = _byte_level(fields, tokens) if model == "gpt2" else _sentencepiece(fields, tokens)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[i] != USER_DEFINED,
        }
        for i, token in enumerate(tokens)
        if kinds[i] in (CONTROL, USER_DEFINED) or (kinds[i] == UNKNOWN and model == "llama")
    ]
    special = {name: _token(fields, tokens, key) for name, key in _SPECIAL.items()}
    # Where the field is missing llama.cpp puts a bos before SentencePiece's ids and Llama 3's.
    before = model == "llama" or PRE[fields.text(f"{P}pre", "default")] == _LLAMA3
    bos = special["bos_token"] if fields.flag(f"{P}add_bos_token", before) else None
    eos = special["eos_token"] if fields.flag(f"{P}add_eos_token") else None
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **built,
        "post_processor": _template(tokens, bos, eos, built["post_processor"]),
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.integer(f"{fields.text('general.architecture')}.context_length", 1 << 30),
        **{name: token for name, token in special.items() if token is not None},
    }
    if template := fields.text("tokenizer.chat_template", None):
        config["chat_template"] = template
    (out / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return True


_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def _numbers(fields: Fields, key: str, count: int) -> list[float] | None:
    """An array with a number for each token; None where there is no such field."""
    found = fields.data.get(P + key)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != count or not all(isinstance(x, int | float) for x in found):
        kind = f"{len(found)} entries" if isinstance(found, list) else type(found).__name__
        raise CheckpointError(f"{fields.where}: {P}{key}: found {kind}, expected {count} numbers, one a token")
    return found


def _token(fields: Fields, tokens: tuple[str, ...], key: str) -> str | None:
    index = fields.integer(P + key, None, minimum=0)
    if index is not None and index >= len(tokens):
        raise fields.error(P + key, f"an id below {len(tokens)}")
    return None if index is None else tokens[index]


def _byte_level(fields: Fields, tokens: tuple[str, ...]) -> dict[str, Any]:
    pre = fields.text(f"{P}pre", "default")
    if pre not in PRE:
        raise UnsupportedError(
            f"{fields.where}: {P}pre: {pre!r} is not supported; supported: {', '.join(PRE)}; name the original model's "
            "tokenizer with --tokenizer-path"
        )
    merges, known = [merge.split(" ") for merge in fields.texts(f"{P}merges")], set(tokens)
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
            raise CheckpointError(
                f"{fields.where}: {P}merges: found {' '.join(pair)[:80]!r}, expected pairs of tokens that make a token"
            )
    if PRE[pre] is None and pre != "gpt-2":
        log.warning(
            "%s: %spre is %s: how its model cuts text is not known, GPT-2's way is taken, and other tokens than the "
            "model has learned may come of it; name the original model's tokenizer with --tokenizer-path",
            *(fields.where, P, repr(pre) if f"{P}pre" in fields.data else "missing"),
        )
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": PRE[pre] is None}
    cut: Any = level
    if PRE[pre] is not None:
        split = {"type": "Split", "pattern": {"Regex": PRE[pre]}, "behavior": "Isolated", "invert": False}
        cut = {"type": "Sequence", "pretokenizers": [split, level]}
    return {
        "normalizer": {"type": "NFC"} if pre in ("qwen2", "deepseek-r1-qwen") else None,
        "pre_tokenizer": cut,
        "post_processor": {**level, "use_regex": True},
        "decoder": {**level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": PRE[pre] == _LLAMA3,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _sentencepiece(fields: Fields, tokens: tuple[str, ...]) -> dict[str, Any]:
    scores = _numbers(fields, "scores", len(tokens))
    if scores is None:
        raise fields.error(f"{P}scores", f"{len(tokens)} numbers, one a token")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        cuts.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        merges += [(float(score), *cut) for cut in cuts]
    merges.sort(key=lambda merge: -merge[0])
    unknown = _token(fields, tokens, "unknown_token_id")
    prefix = [{"type": "Prepend", "prepend": "▁"}] if fields.flag(f"{P}add_space_prefix", True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in merges],
        },
    }


def _template(tokens: tuple[str, ...], bos: str | None, eos: str | None, then: Any) -> Any:
    """Adds BOS and EOS as the file asks."""
    if bos is None and eos is None:
        return then
    index = {token: i for i, token in enumerate(tokens)}

    def around(sequences: str) -> list[Any]:
        found: list[Any] = []
        for number, name in enumerate(sequences):
            begin = [{"SpecialToken": {"id": bos, "type_id": number}}] if bos else []
            end = [{"SpecialToken": {"id": eos, "type_id": number}}] if eos else []
            found += [*begin, {"Sequence": {"id": name, "type_id": number}}, *end]
        return found

    special = {t: {"id": t, "ids": [index[t]], "tokens": [t]} for t in (bos, eos) if t is not None}
    template = {"type": "TemplateProcessing", "single": around("A"), "pair": around("AB"), "special_tokens": special}
    return template if then is None else {"type": "Sequence", "processors": [then, template]}
