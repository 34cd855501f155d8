"""AWQ cases by AutoAWQ: quantize, save, then dequantize every module with the tool's own dequantize_gemm."""

from __future__ import annotations

import shutil
import sys
import warnings

import torch
from awq import AutoAWQForCausalLM
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file
from tiny import QUANTIZED_SHAPE, VOCAB, WORK, base_folder, calibration, finish, make_model, versions
from transformers import AutoTokenizer


def dequantize(folder, group_size: int) -> dict[str, torch.Tensor]:
    """name -> fp32 weight [N, K], scales and product in fp32; other tensors as they are."""
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".qweight")]:
        module = key.removesuffix(".qweight")
        qweight, qzeros, scales = (tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
        tensors[f"{module}.weight"] = dequantize_gemm(qweight, qzeros, scales.float(), 4, group_size).T.contiguous()
    return tensors


def make(name: str, scheme: str, group_size: int, skip: list[str] | None = None, arch="llama", **shape) -> None:
    seed = len(name) * 1000 + sum(map(ord, name))
    # The tool's clip search wants N % 64 == 0.
    heads = {"head_dim": 32} if arch == "qwen2" else {"num_key_value_heads": 4}
    base = base_folder(name, make_model(arch, torch.float16, seed, **(QUANTIZED_SHAPE | heads | shape)))
    model = AutoAWQForCausalLM.from_pretrained(str(base), device_map="cpu", use_cache=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    options = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    if skip:
        options["modules_to_not_convert"] = skip
    rows = [row.tolist() for row in calibration(rows=64)]
    model.quantize(tokenizer, quant_config=options, calib_data=rows, max_calib_samples=64, max_calib_seq_len=64)
    folder = WORK / "saved" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_quantized(str(folder))
    dense = dequantize(folder, group_size)
    if model.model.config.tie_word_embeddings:
        dense.pop("lm_head.weight", None)
    assert dense["model.embed_tokens.weight"].shape[0] == VOCAB
    finish(name, folder, dense, {"tool": "autoawq", "scheme": scheme, "versions": versions("autoawq")})


CASES = {
    "awq-g64": lambda name: make(name, "GEMM g64", 64, tie_word_embeddings=True),
    "awq-g32-skip": lambda name: make(
        name, "GEMM g32, v_proj and o_proj not converted", 32, ["v_proj", "o_proj"], tie_word_embeddings=False
    ),
    "awq-g32-qwen2": lambda name: make(name, "GEMM g32, qkv bias", 32, arch="qwen2", tie_word_embeddings=True),
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        CASES[case](case)
