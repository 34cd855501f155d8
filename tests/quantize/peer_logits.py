"""Run by the peers' interpreter: loads a checkpoint with the peers' own code on a CPU, and writes its logits.

python peer_logits.py KIND DIR IDS.npy OUT.npy     KIND: transformers | gptqmodel | autoawq
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch


def by_transformers(folder: str) -> torch.nn.Module:
    """compressed-tensors through transformers; fp8 dequantized by transformers."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    options = {}
    if config["quant_method"] == "fp8":
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def by_gptqmodel(folder: str) -> torch.nn.Module:
    """GPTQModel's loader and its torch kernel, which knows 16-bit types only."""
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model


def by_autoawq(folder: str) -> torch.nn.Module:
    """AutoAWQ's own unpacking (packing_utils, loaded as a file: the package wants an old transformers), the weights
    then in a plain float32 model."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    where = importlib.util.find_spec("awq").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("packing_utils", Path(where) / "utils" / "packing_utils.py")
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    config = AutoConfig.from_pretrained(folder)
    group = config.quantization_config["group_size"]
    del config.quantization_config
    tensors = load_file(Path(folder) / "model.safetensors")
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        parts = [tensors.pop(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales")]
        size = len(parts[0]) if group == -1 else group  # as AutoAWQ's WQLinear_GEMM has it
        tensors[f"{name}.weight"] = packing.dequantize_gemm(*parts[:2], parts[2].float(), 4, size).T.contiguous()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def main() -> None:
    kind, folder, ids, out = sys.argv[1:]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = {"transformers": by_transformers, "gptqmodel": by_gptqmodel, "autoawq": by_autoawq}[kind](folder)
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.from_numpy(np.load(ids).astype(np.int64))).logits
    np.save(out, logits.float().numpy())


if __name__ == "__main__":
    main()
