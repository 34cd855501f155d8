"""Flags of SGLang and vLLM that the server does not have: the error says what to give instead."""

from __future__ import annotations

import argparse
from typing import NoReturn

_ONE_GPU = "a worker uses one GPU; for one on each of N: jqserve gateway --model-path DIR --workers N"
_ALWAYS = "always on; leave it out"
_CHOSEN = "chosen by device and shape; leave it out (`jqserve plan` shows what runs)"
_GATEWAY = "a gateway in front of the worker does this (`jqserve gateway`)"
_NEVER = "code of a checkpoint is never run; leave it out"
_READ = "read from the checkpoint's config.json; change it there"
_SPECULATIVE = "there is no speculative decoding"
_LORA = "there are no LoRA adapters: merge one into the checkpoint, and quantize that"

#: flag -> what to do, in words. A flag that begins with one that ends in "-" has its hint.
HINTS = {
    **dict.fromkeys(("--tp", "--tp-size", "--tensor-parallel-size", "--dp", "--dp-size"), _ONE_GPU),
    **dict.fromkeys(("--data-parallel-size", "--pp-size", "--pipeline-parallel-size", "--ep-size"), _ONE_GPU),
    **dict.fromkeys(("--nnodes", "--node-rank", "--dist-init-addr", "--enable-expert-parallel"), _ONE_GPU),
    "--max-model-len": "give --context-length",
    "--max-num-seqs": "give --max-running-requests",
    "--max-num-batched-tokens": "give --chunked-prefill-size",
    "--gpu-memory-utilization": "give --mem-fraction-static",
    "--max-queued-requests": "give --max-queued",
    "--seed": "give --random-seed",
    "--tokenizer": "give --tokenizer-path",
    "--kv-cache-memory-bytes": "give --num-pages, or --mem-fraction-static",
    "--block-size": "give --page-size",
    "--enforce-eager": "give --disable-cuda-graph",
    "--num-scheduler-steps": "give --num-continuous-decode-steps",
    "--no-enable-prefix-caching": "give --disable-radix-cache",
    "--skip-tokenizer-init": "give token ids in the requests; nothing else is needed",
    "--enable-metrics": "give --metrics-port PORT",
    "--download-dir": "set HF_HOME",
    "--device": "JAX chooses: a GPU where there is one; set JAX_PLATFORMS=cpu to keep off it",
    "--max-total-tokens": "give --num-pages, counted in pages of --page-size tokens",
    "--num-gpu-blocks-override": "give --num-pages",
    "--max-prefill-tokens": "give --chunked-prefill-size",
    "--ssl-keyfile": "give --tls-key",
    "--ssl-certfile": "give --tls-cert",
    "--ssl-ca-certs": "give --tls-client-ca",
    "--disable-chunked-prefix-cache": "give --disable-radix-cache",
    "--uds": "give --unix-socket",
    **dict.fromkeys(("--json-model-override-args", "--hf-overrides", "--rope-scaling", "--rope-theta"), _READ),
    **dict.fromkeys(("--enable-prefix-caching", "--enable-chunked-prefill", "--enable-mixed-chunk"), _ALWAYS),
    **dict.fromkeys(("--enable-torch-compile", "--attention-backend", "--sampling-backend"), _CHOSEN),
    **dict.fromkeys(("--cuda-graph-max-bs", "--cuda-graph-bs", "--compilation-config", "--fp8-gemm-backend"), _CHOSEN),
    **dict.fromkeys(("--tool-call-parser", "--reasoning-parser", "--enable-auto-tool-choice"), _GATEWAY),
    "--grammar-backend": "always llguidance; leave it out",
    "--trust-remote-code": _NEVER,
    "--speculative-": _SPECULATIVE,
    **dict.fromkeys(("--lora-", "--enable-lora", "--max-loras-"), _LORA),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse's, whose error for an unknown flag has our hint for it."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            hints = {flag: found for flag in _flags(message) if (found := hint(flag)) is not None}
            message += "".join(f"\n  {flag}: {what}" for flag, what in hints.items())
        super().error(message)


def hint(flag: str) -> str | None:
    """What to do instead of another server's flag; None: it is nobody's that we know."""
    if flag in HINTS:
        return HINTS[flag]
    return next((what for start, what in HINTS.items() if start.endswith("-") and flag.startswith(start)), None)


def _flags(message: str) -> list[str]:
    return [word.partition("=")[0] for word in message.split() if word.startswith("--")]
