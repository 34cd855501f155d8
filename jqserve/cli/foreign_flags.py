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
_SCHEDULED = "first come, first served; leave it out"
_NO_OFFLOAD = (
    "weights and KV pages stay on the device; give --quantization for smaller weights, --kv-cache-dtype fp8_e4m3"
)
_SAMPLING = "read from the checkpoint's generation_config.json; requests may say otherwise"
_CHOOSE_GPU = "set CUDA_VISIBLE_DEVICES"
_LORA = "there are no LoRA adapters: merge one into the checkpoint, and quantize that"

#: flag -> what to do, in words. A flag that begins with one that ends in "-" has its hint.
HINTS = {
    **dict.fromkeys(("--tp", "--tp-size", "--tensor-parallel-size", "--dp", "--dp-size"), _ONE_GPU),
    **dict.fromkeys(("--data-parallel-size", "--pp-size", "--pipeline-parallel-size", "--ep-size"), _ONE_GPU),
    **dict.fromkeys(("-tp", "-dp", "-pp", "--pp", "--ep"), _ONE_GPU),
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
    **dict.fromkeys(("--schedule-policy", "--scheduling-policy", "--preemption-mode"), _SCHEDULED),
    **dict.fromkeys(("--cpu-offload-gb", "--swap-space", "--enable-hierarchical-cache"), _NO_OFFLOAD),
    **dict.fromkeys(("--generation-config", "--override-generation-config", "--sampling-defaults"), _SAMPLING),
    **dict.fromkeys(("--base-gpu-id", "--gpu-id-step"), _CHOOSE_GPU),
    **dict.fromkeys(("--guided-decoding-backend", "--structured-outputs-config"), "always llguidance; leave it out"),
    **dict.fromkeys(("--disable-log-requests", "--no-enable-log-requests"), "off unless --log-requests is given"),
    **dict.fromkeys(("--enable-log-requests", "--log-requests-level"), "give --log-requests"),
    **dict.fromkeys(("--uvicorn-log-level", "--log-level-http"), "there is no HTTP server; give --log-level"),
    **dict.fromkeys(("--allowed-origins", "--root-path", "--middleware", "--response-role"), _GATEWAY),
    **dict.fromkeys(("--chat-template-content-format", "--disable-uvicorn-access-log"), "leave it out"),
    **dict.fromkeys(("--prefill-attention-backend", "--decode-attention-backend"), _CHOSEN),
    **dict.fromkeys(("--cudagraph-capture-sizes", "--max-seq-len-to-capture"), _CHOSEN),
    **dict.fromkeys(("--disable-custom-all-reduce", "--disable-cuda-graph-padding"), "leave it out"),
    "--async-scheduling": _ALWAYS,
    "--no-enable-chunked-prefill": "a long prompt always comes in chunks; give a larger --chunked-prefill-size",
    "--no-async-scheduling": "give --disable-overlap-schedule",
    "--enable-deterministic-inference": "give --dtype float32, where a request's tokens do not depend on others",
    "-q": "give --quantization",
    "--watchdog-timeout": "an engine that dies ends the server; give --max-request-seconds for a limit of a request",
    "--max-logprobs": "always 20; leave it out",
    "--admin-api-key": "give --admin, and --api-key-file for everybody",
    "--grpc-mode": "always; leave it out",
    "--disable-log-stats": "`jqserve top` asks for them, and --metrics-port serves them; nothing is logged",
    "--shutdown-timeout": "give --drain-timeout",
    "--skip-server-warmup": "give --disable-warmup",
    "--model-impl": "leave it out",
    "--speculative-": _SPECULATIVE,
    **dict.fromkeys(("--lora-", "--enable-lora", "--max-loras-"), _LORA),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse's, whose error for an unknown flag has our hint for it."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            hints = {flag: what for flag in _flags(message) if (what := hint(flag)) is not None and self._knows(what)}
            first = message.split()[2]
            if "/" in first and not first.startswith("-") and self._knows("--model-path"):
                hints[first] = f"if it is the model, give --model-path {first}"
            message += "".join(f"\n  {flag}: {what}" for flag, what in hints.items())
        super().error(message)

    def _knows(self, what: str) -> bool:
        """Whether all the flags that a hint names are this command's, or it names another command's."""
        told = {word.strip(",;:`") for word in what.split() if word.startswith("--")}
        return told <= self._option_string_actions.keys() or "jqserve gateway" in what


def hint(flag: str) -> str | None:
    """What to do instead of another server's flag; None: it is nobody's that we know."""
    if flag in HINTS:
        return HINTS[flag]
    return next((what for start, what in HINTS.items() if start.endswith("-") and flag.startswith(start)), None)


def _flags(message: str) -> list[str]:
    return [word.partition("=")[0] for word in message.split() if word.startswith("-")]
