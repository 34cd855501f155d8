"""GPTQ cases by AutoGPTQ 0.4.2 (2023): `quantize_config.json` only, `gptq_model-4bit-64g.safetensors`, zero biases.

The tool wants a GPU for its own placement of layers only; here its names for that device mean the CPU.
"""

from __future__ import annotations

import shutil
import sys

import auto_gptq.modeling._base as tool
import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old
from safetensors.torch import load_file
from tiny import QUANTIZED_SHAPE, WORK, base_folder, calibration, finish, make_model, versions


def on_cpu() -> None:
    tool.CUDA_0 = torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_, **__: None
    tool.get_max_memory = lambda *_, **__: {"cpu": 1 << 33}


def dequantize(folder, group_size: int, desc_act: bool) -> dict[str, torch.Tensor]:
    """fp32 weights: with fp32 scales, the matrix that the tool's own QuantLinear.forward hands to torch.matmul."""
    kind = qlinear_cuda.QuantLinear if desc_act else qlinear_cuda_old.QuantLinear
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    matmul, seen = torch.matmul, []

    def watch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight)
        return matmul(x.float(), weight)

    for key in [key for key in tensors if key.endswith(".qweight")]:
        module = key.removesuffix(".qweight")
        names = [name for name in tensors if name.startswith(f"{module}.")]
        part = {name.removeprefix(f"{module}."): tensors.pop(name) for name in names}
        k, n = part["g_idx"].numel(), part["scales"].shape[1]
        linear = kind(4, group_size, k, n, bias=True)
        linear.load_state_dict(part)
        linear.scales = linear.scales.float()
        linear.autogptq_cuda_available = False
        torch.matmul = watch
        linear(torch.zeros(1, k))
        torch.matmul = matmul
        tensors[f"{module}.weight"] = seen.pop().T.contiguous()
        assert tensors[f"{module}.weight"].dtype == torch.float32
        if float(part["bias"].abs().max()) > 0:
            tensors[f"{module}.bias"] = part["bias"]
    return tensors


def make(name: str, scheme: str, arch: str = "llama", **options) -> None:
    seed = len(name) * 1000 + sum(map(ord, name))
    shape = QUANTIZED_SHAPE | {"hidden_size": 64, "tie_word_embeddings": True}
    base = base_folder(name, make_model(arch, torch.float16, seed, **shape))
    model = AutoGPTQForCausalLM.from_pretrained(str(base), BaseQuantizeConfig(**options), attn_implementation="eager")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration()]
    model.quantize(rows, batch_size=1, cache_examples_on_gpu=False)
    folder = WORK / "saved" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_quantized(str(folder), use_safetensors=True)
    dense = dequantize(folder, options["group_size"], options.get("desc_act", False))
    dense.pop("lm_head.weight", None)
    meta = {"tool": "auto-gptq", "scheme": scheme, "versions": versions("auto-gptq")}
    finish(name, folder, dense, meta)


CASES = {
    "gptq-old-g64": lambda name: make(
        name, "4-bit g64 sym, quantize_config.json only, head copied, zero biases", bits=4, group_size=64
    ),
    "gptq-old-g32-asym": lambda name: make(
        name, "4-bit g32 asym desc_act, quantize_config.json only", bits=4, group_size=32, sym=False, desc_act=True
    ),
}


if __name__ == "__main__":
    on_cpu()
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        CASES[case](case)
