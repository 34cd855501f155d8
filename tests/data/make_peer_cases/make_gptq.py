"""GPTQ cases by GPTQModel: quantize, save, then dequantize every module with the tool's own TorchLinear."""

from __future__ import annotations

import json
import os
import shutil
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores is 1, which its own loader pool refuses

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors import safe_open
from tiny import QUANTIZED_SHAPE, WORK, base_folder, calibration, finish, make_model, versions

TIED = {"tie_word_embeddings": True}


def positive_rows(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Every third row of the MLP's matrices has no negative weight: its zero points are 0."""
    if "gate_proj" in name or "down_proj" in name:
        weight = weight.clone()
        weight[::3] = weight[::3].abs()
    return weight


def dequantize(folder, bits: int, v1: bool) -> dict[str, torch.Tensor]:
    """name -> fp32 weight, by TorchLinear.dequantize_weight with fp32 scales; other tensors as they are."""
    config = json.loads((folder / "quantize_config.json").read_text())
    out, tensors = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    for key in [key for key in tensors if key.endswith(".qweight")]:
        module = key.removesuffix(".qweight")
        part = {name: tensors.pop(f"{module}.{name}") for name in ("qweight", "qzeros", "scales", "g_idx")}
        k, n = part["g_idx"].numel(), part["scales"].shape[1]
        linear = TorchLinear(
            bits=bits,
            group_size=config["group_size"],
            desc_act=config["desc_act"],
            sym=config["sym"],
            in_features=k,
            out_features=n,
            bias=False,
            register_buffers=True,
        )
        linear.scales = linear.scales.float()
        for name, value in part.items():
            getattr(linear, name).copy_(value)
        if v1:
            convert_gptq_v1_to_v2_format_module(linear, bits=bits, pack_dtype=torch.int32)
        linear.post_init()
        linear.optimized = True
        out[f"{module}.weight"] = linear.dequantize_weight().T.float().contiguous()
    return out | tensors


def make(name: str, scheme: str, arch="llama", dtype=torch.bfloat16, edit=None, shape=None, **options) -> None:
    seed = len(name) * 1000 + sum(map(ord, name))
    model = make_model(arch, dtype, seed, edit, **(QUANTIZED_SHAPE | TIED | (shape or {})))
    base = base_folder(name, model)
    v1 = options.get("format", FORMAT.GPTQ) == FORMAT.GPTQ
    config = QuantizeConfig(**({"act_group_aware": False, "offload_to_disk": False} | options))
    quantizer = GPTQModel.load(str(base), config, device="cpu")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration()]
    quantizer.quantize(rows, batch_size=4)
    folder = WORK / "saved" / name
    shutil.rmtree(folder, ignore_errors=True)
    quantizer.save(str(folder))
    meta = {"tool": "gptqmodel", "scheme": scheme, "versions": versions("gptqmodel")}
    finish(name, folder, dequantize(folder, options.get("bits", 4), v1), meta)


CASES = {
    "gptq-g32-v1": lambda name: make(name, "4-bit g32 sym v1", group_size=32),
    "gptq-g64-v2": lambda name: make(name, "4-bit g64 sym v2", group_size=64, format=FORMAT.GPTQ_V2),
    "gptq-gneg1-v1": lambda name: make(name, "4-bit, one group a column (-1), sym v1", group_size=-1),
    "gptq-g32-desc-act": lambda name: make(name, "4-bit g32 sym v1, desc_act", group_size=32, desc_act=True),
    "gptq-g32-asym-v1-zero": lambda name: make(
        name, "4-bit g32 asym v1, zero points of 0", group_size=32, sym=False, edit=positive_rows
    ),
    "gptq-g32-asym-v2-zero": lambda name: make(
        name, "4-bit g32 asym v2, zero points of 0", group_size=32, sym=False, edit=positive_rows, format=FORMAT.GPTQ_V2
    ),
    "gptq-8bit-g32-asym-v1": lambda name: make(
        name, "8-bit g32 asym v1, zero points of 0", bits=8, group_size=32, sym=False, edit=positive_rows
    ),
    "gptq-8bit-gneg1-desc-act-v2": lambda name: make(
        name, "8-bit, group -1, sym v2, desc_act", bits=8, group_size=-1, desc_act=True, format=FORMAT.GPTQ_V2
    ),
    "gptq-fp16-qwen2": lambda name: make(
        name,
        "4-bit g64 sym v2, fp16 base, qkv bias",
        "qwen2",
        torch.float16,
        group_size=64,
        format=FORMAT.GPTQ_V2,
        shape={"num_attention_heads": 4, "num_key_value_heads": 1},
    ),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        CASES[case](case)
