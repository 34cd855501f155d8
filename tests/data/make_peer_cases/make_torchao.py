"""torchao int8wo, fp8wo and fp8dq, saved by transformers to safetensors, with their references.

    pip install torch==2.13.0 torchao==0.18.0 transformers accelerate && python make_torchao.py

torchao quantizes for fp8dq only where a GPU could run it; that question is answered for it here. (int4wo needs mslk,
which is for GPUs only: its reader is tested on tensors made by FORMATS.md.) The dequantized weights are torchao's own;
logits are those of a plain fp32 transformers model over them.
"""

from __future__ import annotations

import sys

import torch
from plain_outputs import make_case
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quant_api,
)
from transformers import TorchAoConfig

quant_api._check_hardware_support = lambda granularity: None
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


if __name__ == "__main__":
    for case in sys.argv[1:] or SCHEMES:
        make_case(case, SCHEMES[case], 3, dequantized)
