"""--quantization, --torchao-config and --calibration, the same in every command that loads a model."""

from __future__ import annotations

import argparse
from typing import Any

from jqserve.errors import UnsupportedError


def add_scheme_flags(parser: Any) -> None:
    """Adds them; `quantization_of` reads the first two."""
    parser.add_argument(
        "--quantization",
        metavar="NAME",
        default=None,
        help="unquantized weights are quantized while loading: fp8, fp8_block, w8a8_int8, int8, int4, int4-32 to -256, "
        "bitsandbytes; awq and gptq are calibrated first (minutes); a quantized checkpoint needs no flag "
        "(docs/quantization-flags.md has every pair)",
    )
    parser.add_argument(
        "--torchao-config",
        metavar="NAME",
        default=None,
        help="torchao's arithmetic: int8wo, int8dq, fp8wo, fp8dq-per_tensor, fp8dq-per_row, int4wo-32 to -256",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE|DIR",
        default=None,
        help="for --quantization awq and gptq: .txt, .jsonl or .npy of token ids; without it, a small built-in text",
    )


def quantization_of(args: argparse.Namespace) -> str | None:
    """What `load` takes as `quantization`. Raises UnsupportedError when both flags are given."""
    if args.torchao_config is None:
        return args.quantization
    if args.quantization not in (None, "none", "auto"):
        raise UnsupportedError(
            f"--quantization {args.quantization} and --torchao-config {args.torchao_config}: give one of them"
        )
    return f"torchao:{args.torchao_config}"
