"""Plain `quant_method: fp8` per-tensor cases: AutoFP8's own quantizer, and transformers' finegrained fp8 with no block.

AutoFP8 is not on PyPI: AUTOFP8 names a checkout of github.com/neuralmagic/AutoFP8 (commit 505a7ed). Its functions are
called in the order of AutoFP8ForCausalLM.quantize, without its tokenizer and device_map steps.
"""

from __future__ import annotations

import json
import os
import shutil
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import QUANTIZED_SHAPE, WORK, calibration, finish, make_model, versions

sys.path.insert(0, os.environ.get("AUTOFP8", "/tmp/peers/AutoFP8"))
TIED = {"tie_word_embeddings": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
#: AutoFP8's own module takes one scale for the whole input; a server takes one a token, as vLLM's does.
DYNAMIC = STATIC | {"strategy": "token", "dynamic": True}


def read(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def split(tensors: dict[str, torch.Tensor], weight_scale: str, input_scale: str) -> tuple[dict, dict]:
    """fp32 weights and the activations' table of a file with these two scale names."""
    dense, activations = {}, {}
    for key, value in tensors.items():
        if key.endswith((weight_scale, input_scale)):
            continue
        module = key.removesuffix(".weight")
        if f"{module}.{weight_scale}" in tensors:
            assert value.dtype == torch.float8_e4m3fn
            dense[key] = value.float() * tensors[f"{module}.{weight_scale}"].float()
            scale = tensors.get(f"{module}.{input_scale}")
            entry = {"args": DYNAMIC, "scale": None} if scale is None else {"args": STATIC, "scale": float(scale)}
            activations[module] = entry
        else:
            dense[key] = value
    return dense, activations


def by_autofp8(name: str, scheme: str, activation_scheme: str, ignore: list[str], arch="llama", **shape) -> None:
    from auto_fp8 import BaseQuantizeConfig, quantize
    from auto_fp8.modeling import get_layers_to_ignore

    seed = len(name) * 1000 + sum(map(ord, name))
    model = make_model(arch, torch.bfloat16, seed, **(QUANTIZED_SHAPE | TIED | shape))
    config = BaseQuantizeConfig(activation_scheme=activation_scheme, ignore_patterns=ignore)
    config.ignored_layers = sorted(get_layers_to_ignore(model, ignore))
    quantize.quantize_weights(model, config)
    if activation_scheme == "static":
        quantize.quantize_activations(model, config, torch.tensor(calibration(), dtype=torch.long))
    folder = WORK / "saved" / name
    shutil.rmtree(folder, ignore_errors=True)
    entry = {"quant_method": "fp8", "activation_scheme": activation_scheme, "ignored_layers": config.ignored_layers}
    model.config.update({"quantization_config": entry})
    model.save_pretrained(folder)
    tensors = read(folder)
    tensors.pop("lm_head.weight", None)
    dense, activations = split(tensors, "weight_scale", "input_scale")
    meta = {"tool": "AutoFP8 505a7ed (quantize.py)", "scheme": scheme, "versions": versions()}
    finish(name, folder, dense, meta, activations)


def by_transformers(name: str, scheme: str, activation_scheme: str, skip: list[str]) -> None:
    """Fp8Quantize with weight_block_size null; it names the scales `weight_scale_inv` and `activation_scale`.

    transformers makes these files only on a GPU, so its quantize operation is called here module by module, and the
    static scale is the absmax of the calibration inputs / 448.
    """
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    seed = len(name) * 1000 + sum(map(ord, name))
    model = make_model("llama", torch.bfloat16, seed, **(QUANTIZED_SHAPE | TIED))
    config = FineGrainedFP8Config(
        activation_scheme=activation_scheme, weight_block_size=None, modules_to_not_convert=["lm_head", *skip]
    )

    class Holder:
        quantization_config = config

    peaks: dict[str, float] = {}
    linears = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(key.endswith(entry) for entry in ("lm_head", *skip))
    }

    def watch(key):
        def hook(module, inputs):
            peaks[key] = max(peaks.get(key, 0.0), float(inputs[0].abs().max()))

        return hook

    handles = [module.register_forward_pre_hook(watch(key)) for key, module in linears.items()]
    with torch.no_grad():
        model(torch.tensor(calibration(), dtype=torch.long))
    for handle in handles:
        handle.remove()
    tensors = dict(model.state_dict())
    tensors.pop("lm_head.weight")
    oracle = {}
    for key in linears:
        made = Fp8Quantize(Holder).convert({f"{key}.weight": tensors[f"{key}.weight"]})
        made[f"{key}.weight_scale_inv"] = made[f"{key}.weight_scale_inv"].reshape(())
        if activation_scheme == "static":
            made[f"{key}.activation_scale"] = torch.tensor(peaks[key] / 448.0, dtype=torch.float32)
        tensors |= made
        back = Fp8Dequantize(Holder)
        oracle[f"{key}.weight"] = back._dequantize_one(
            made[f"{key}.weight"], made[f"{key}.weight_scale_inv"], torch.float32
        )
    folder = WORK / "saved" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.config.quantization_config = config
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    dense, activations = split(tensors, "weight_scale_inv", "activation_scale")
    assert all(torch.equal(dense[key], value) for key, value in oracle.items())
    meta = {"tool": "transformers Fp8Quantize, weight_block_size null", "scheme": scheme, "versions": versions()}
    finish(name, folder, dense, meta, activations)
    print(json.dumps(config.to_dict()))


CASES = {
    "fp8-dynamic": lambda name: by_autofp8(name, "per tensor, dynamic activations", "dynamic", ["re:.*lm_head"]),
    "fp8-static": lambda name: by_autofp8(name, "per tensor, static activations", "static", ["re:.*lm_head"]),
    "fp8-static-ignored": lambda name: by_autofp8(
        name, "per tensor, static, k_proj and down_proj in ignored_layers", "static",
        ["re:.*lm_head", "re:.*k_proj", "re:.*down_proj"], "qwen2",
    ),
    "fp8-hf-static": lambda name: by_transformers(
        name, "per tensor, static; weight_scale_inv and activation_scale are scalars ()", "static", []
    ),
    "fp8-hf-dynamic-skip": lambda name: by_transformers(
        name, "per tensor, dynamic; o_proj in modules_to_not_convert", "dynamic", ["o_proj"]
    ),
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for case in sys.argv[1:] or CASES:
        CASES[case](case)
