"""compressed-tensors cases by LLM Compressor 0.8 (compressed-tensors 0.12): what 0.14 no longer makes.

Its decompressor refuses packed zero points, so the parts are unpacked and dequantized by its own functions directly.
"""

from __future__ import annotations

import json
import shutil
import sys

import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize as tool_dequantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from safetensors.torch import load_file
from tiny import QUANTIZED_SHAPE, WORK, base_folder, calibration, finish, make_model, versions
from transformers import AutoModelForCausalLM


def dequantize(folder, bits: int) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".weight_packed")]:
        module = key.removesuffix(".weight_packed")
        shape = torch.Size(tensors.pop(f"{module}.weight_shape"))
        scale = tensors.pop(f"{module}.weight_scale").float()
        zero = tensors.pop(f"{module}.weight_zero_point", None)
        if zero is not None:
            zero = unpack_from_int32(zero, bits, torch.Size((shape[0], scale.shape[1])), packed_dim=0)
        order = tensors.pop(f"{module}.weight_g_idx", None)
        value = unpack_from_int32(tensors.pop(key), bits, shape)
        weight = tool_dequantize(x_q=value, scale=scale, zero_point=zero, g_idx=order)
        assert weight.dtype == torch.float32
        tensors[f"{module}.weight"] = weight
    return tensors


def make(name: str, title: str, modifier, bits: int = 4, **options) -> None:
    seed = len(name) * 1000 + sum(map(ord, name))
    model = make_model("llama", torch.bfloat16, seed, **(QUANTIZED_SHAPE | {"tie_word_embeddings": True}))
    model = AutoModelForCausalLM.from_pretrained(base_folder(name, model), torch_dtype=torch.bfloat16)
    rows = calibration()
    data = {}
    if modifier is GPTQModifier:
        columns = {"input_ids": rows.tolist(), "attention_mask": [[1] * rows.shape[1]] * len(rows)}
        data = {"num_calibration_samples": len(rows), "max_seq_length": rows.shape[1]}
        data["dataset"] = Dataset.from_dict(columns)
    oneshot(model=model, recipe=modifier(ignore=["lm_head"], **options), **data)
    folder = WORK / "saved" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_compressed=True)
    config = json.loads((folder / "config.json").read_text())
    print(json.dumps(config["quantization_config"]["config_groups"]))
    meta = {"tool": "llmcompressor", "scheme": title, "versions": versions("llmcompressor", "compressed-tensors")}
    finish(name, folder, dequantize(folder, bits), meta)


def grouped(actorder: str, symmetric: bool) -> dict:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "dynamic": False}
    weights |= {"symmetric": symmetric, "actorder": actorder}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


CASES = {
    "ctold-w8a16-preset": lambda name: make(
        name, "preset W8A16", QuantizationModifier, 8, targets="Linear", scheme="W8A16"
    ),
    "ctold-w4a16-g32-actorder-asym": lambda name: make(
        name, "W4A16 g32 asym, actorder group (weight_g_idx)", GPTQModifier, config_groups=grouped("group", False)
    ),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        CASES[case](case)
