"""torchao int8wo, fp8wo and fp8dq, saved by transformers to safetensors, with their references.

    pip install torch==2.13.0 torchao==0.18.0 transformers accelerate && python make_torchao.py

torchao quantizes for fp8dq only where a GPU could run it; that question is answered for it here. (int4wo needs mslk,
which is for GPUs only: its reader is tested on tensors made by FORMATS.md.) The dequantized weights are torchao's own;
logits are those of a plain fp32 transformers model over them.
"""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import torch
import transformers
from plain_outputs import LENGTHS, outputs
from tiny import CASES, QUANTIZED_SHAPE, VOCAB, WORK, make_model
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quant_api,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

quant_api._check_hardware_support = lambda granularity: None
KEPT = ("config.json", "generation_config.json", "model.safetensors")
SCHEMES = {
    "torchao-int8wo": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao-fp8wo": TorchAoConfig(Float8WeightOnlyConfig()),
    "torchao-fp8dq-row": TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())),
    "torchao-fp8dq-tensor": TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())),
}


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """The tool's own float32 weight [N, K]."""
    weight = module.weight
    if hasattr(weight, "dequantize") and type(weight.data) is not torch.Tensor:
        return weight.dequantize(torch.float32)
    return weight.detach().float()


def main() -> None:
    for name in sys.argv[1:] or SCHEMES:
        config = SCHEMES[name]
        shape = QUANTIZED_SHAPE | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
        plain = make_model("llama", seed=3, **shape)
        source, saved = WORK / "base" / name, WORK / "saved" / name
        for folder in (source, saved):
            shutil.rmtree(folder, ignore_errors=True)
        plain.save_pretrained(source)
        quantized = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        quantized.save_pretrained(saved)
        model = make_model("llama", torch.float32, seed=3, **shape)
        model.config._attn_implementation = "eager"
        state = {key: value.float() for key, value in plain.state_dict().items()}
        for path, module in quantized.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                state[f"{path}.weight"] = dequantized(module)
        model.load_state_dict(state)
        model.tie_weights()
        rng, found = np.random.default_rng(5), {}
        for i, length in enumerate(LENGTHS):
            prompt = rng.integers(3, VOCAB, length, dtype=np.int32)
            logits, greedy, margin = outputs(model, prompt)
            found |= {f"prompt_{i}": prompt, f"logits_wdq_{i}": logits.astype(np.float16)}
            found |= {f"greedy_wdq_{i}": greedy, f"margin_wdq_{i}": margin}
        case = CASES / name
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        for file in KEPT:
            shutil.copyfile(saved / file, case / file)
        np.savez_compressed(case / "ref.npz", **found)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        (case / "meta.json").write_text(
            json.dumps({"tool": name.partition("-")[0], "scheme": name, "versions": versions})
        )
        print(name, sorted(p.name for p in case.iterdir()))


if __name__ == "__main__":
    main()
