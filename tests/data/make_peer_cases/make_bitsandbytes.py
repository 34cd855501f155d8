"""bitsandbytes nf4, fp4 and int8, saved by transformers to safetensors, with their references.

    pip install torch bitsandbytes==0.50.2 transformers accelerate && python make_bitsandbytes.py

The dequantized weights are bitsandbytes' own (`dequantize_4bit`, and codes times row statistics over 127 for int8);
logits are those of a plain fp32 transformers model over them. Rows are whole blocks of 64: others are refused.
"""

from __future__ import annotations

import sys

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from plain_outputs import make_case
from transformers import BitsAndBytesConfig


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


if __name__ == "__main__":
    for case in sys.argv[1:] or SCHEMES:
        make_case(case, SCHEMES[case], 11, dequantized, bitsandbytes=bitsandbytes.__version__)
