"""bitsandbytes nf4, fp4 and int8, saved by transformers to safetensors, with their references.

    pip install torch bitsandbytes==0.50.2 transformers accelerate && python make_bitsandbytes.py

The dequantized weights are bitsandbytes' own (`dequantize_4bit`, and codes times row statistics over 127 for int8);
logits are those of a plain fp32 transformers model over them. Rows are whole blocks of 64: others are refused.
"""

from __future__ import annotations

import json
import shutil
import sys

import bitsandbytes
import numpy as np
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from plain_outputs import LENGTHS, outputs
from tiny import CASES, QUANTIZED_SHAPE, VOCAB, WORK, make_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

KEPT = ("config.json", "generation_config.json", "model.safetensors")


def four(kind: str, double: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)


SCHEMES = {
    "bnb-nf4": four("nf4", False),
    "bnb-nf4-double": four("nf4", True),
    "bnb-fp4": four("fp4", False),
    "bnb-fp4-double": four("fp4", True),
    "bnb-int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0),
    "bnb-nf4-skip": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["down_proj", "lm_head"]
    ),
}


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """The tool's own float32 weight [N, K]."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        state = weight.quant_state
        state.dtype = torch.float32  # of what it gives back: nothing is rounded on top
        return dequantize_4bit(weight.data, state)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return weight.data.float() * (weight.SCB.float() / 127)[:, None]
    return weight.detach().float()


def main() -> None:
    for name in sys.argv[1:] or SCHEMES:
        shape = QUANTIZED_SHAPE | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
        plain = make_model("llama", seed=11, **shape)
        source, saved = WORK / "base" / name, WORK / "saved" / name
        for folder in (source, saved):
            shutil.rmtree(folder, ignore_errors=True)
        plain.save_pretrained(source)
        quantized = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=SCHEMES[name], dtype=torch.bfloat16, device_map="cpu"
        )
        quantized.save_pretrained(saved)
        model = make_model("llama", torch.float32, seed=11, **shape)
        model.config._attn_implementation = "eager"
        state = {key: value.float() for key, value in plain.state_dict().items()}
        kinds = set()
        for path, module in quantized.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                state[f"{path}.weight"] = dequantized(module)
                kinds.add(type(module).__name__)
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
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        }
        (case / "meta.json").write_text(json.dumps({"tool": "bitsandbytes", "scheme": name, "versions": versions}))
        print(name, sorted(kinds), sum(p.stat().st_size for p in case.iterdir()), "bytes")


if __name__ == "__main__":
    main()
