"""Prefill attention of others, through torch: cuDNN, FlashAttention-3 (vLLM's build) on contiguous keys and on pages.

Run by bench/peer_tasks.py under a Python that has torch; JSON lines on stdout. S = 4,096, 32/8 heads of 128, bf16; each
against float32 on three rows; CUDA graph replay.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.torch_graph import graph_microseconds

S, H, KV, D, PAGE, CALLS = 4096, 32, 8, 128, 16, 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="/tmp/peers")
    parts = Path(parser.parse_args().parts)
    q = torch.randn(S, H, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(S, KV, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    order = torch.randperm(S // PAGE, device="cuda").to(torch.int32)
    k_pages, v_pages = (torch.empty(S // PAGE, PAGE, KV, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k_pages[order.long()], v_pages[order.long()] = k.view(-1, PAGE, KV, D), v.view(-1, PAGE, KV, D)
    table = order[None]
    lengths = torch.full((1,), S, device="cuda", dtype=torch.int32)
    cu = torch.tensor([0, S], device="cuda", dtype=torch.int32)

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)[None]

    def cudnn(causal: bool) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            args = (heads_first(x) for x in (q, k, v))
            return F.scaled_dot_product_attention(*args, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)

    def fa3(causal: bool, paged: bool) -> torch.Tensor:
        keys, values = (k_pages, v_pages) if paged else (k, v)
        pages = (None, None, lengths, S, S, table) if paged else (cu, None, None, S, S, None)
        cu_k, used_q, used_k, max_q, max_k, page_table = pages
        return torch.ops._vllm_fa3_C.fwd(
            q, keys, values, None, None, None, None, cu, cu_k, None, used_q, used_k, max_q, max_k, page_table,
            None, None, None, None, None, None, None, None, D**-0.5, causal, -1, -1, 0.0, True, None, 0, None, 0, None,
            1, 0, None,
        )[0]  # fmt: skip

    def reference(row: int, causal: bool) -> torch.Tensor:
        end = row + 1 if causal else S
        keys, values = (x[:end].float().repeat_interleave(H // KV, 1) for x in (k, v))
        scores = torch.einsum("hd,shd->hs", q[row].float(), keys) * D**-0.5
        return torch.einsum("hs,shd->hd", scores.softmax(-1), values)

    runs: dict[str, Callable[[bool], torch.Tensor]] = {"cudnn": cudnn}
    try:
        torch.ops.load_library(str(parts / "so" / "_vllm_fa3_C.abi3.so"))
        runs |= {"fa3_paged": lambda causal: fa3(causal, True), "fa3_contiguous": lambda causal: fa3(causal, False)}
    except OSError as error:
        print(json.dumps({"op": "peer", "peer": "fa3", "kind": "load", "failed": str(error)[:200]}), flush=True)
    for name, call in runs.items():
        for causal in (False, True):
            row: dict[str, Any] = {"op": "peer", "peer": name, "scheme": "prefill_bf16"}
            row |= {"kind": "causal" if causal else "full", "context": S}
            try:
                out = call(causal)
                wanted = {r: reference(r, causal) for r in (0, 99, S - 1)}
                worst = max(((out[r].float() - want).norm() / want.norm()).item() for r, want in wanted.items())
                us = graph_microseconds(functools.partial(call, causal), CALLS)
                flops = 4 * (S * (S + 1) / 2 if causal else S * S) * H * D
                row |= {"us": round(us, 1), "tflops": round(flops / us / 1e6)}
                row |= {"error": round(worst, 5), "ok": worst < 0.02}
            except Exception as error:
                row["failed"] = repr(error)[:300]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
