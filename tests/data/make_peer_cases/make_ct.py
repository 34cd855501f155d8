"""compressed-tensors cases by LLM Compressor 0.14: oneshot, save, then the library's own decompressors.

The decompressors get fp32 scales, so that their product is not rounded to bf16.
"""

from __future__ import annotations

import json
import shutil
import sys

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tiny import QUANTIZED_SHAPE, WORK, base_folder, calibration, finish, make_model, versions
from transformers import AutoConfig, AutoModelForCausalLM

TIED = {"tie_word_embeddings": True}


def weights(bits: int, strategy: str, symmetric: bool = True, kind: str = "int", **more) -> dict:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False, **more}


def dynamic_token(kind: str) -> dict:
    return {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}


def static_tensor(kind: str) -> dict:
    return {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True, "dynamic": False}


def group(targets, weight: dict, inputs: dict | None = None) -> dict:
    return {"targets": targets, "weights": weight, "input_activations": inputs}


def dequantize(folder) -> tuple[dict[str, torch.Tensor], dict]:
    """fp32 weights by name, and the activation scheme of every module that has one."""
    config = AutoConfig.from_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    delattr(config, "quantization_config")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    apply_quantization_config(model, QuantizationConfig.model_validate(raw))
    tensors, activations = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        prefix = f"{name}."
        part = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        bias = part.pop("bias", None)
        part["weight_scale"] = part["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(scheme.format or raw["format"])
        input_scale = part.pop("input_scale", None)
        tensors[f"{name}.weight"] = compressor.decompress(part, scheme)["weight"]
        assert tensors[f"{name}.weight"].dtype == torch.float32
        if bias is not None:
            tensors[f"{name}.bias"] = bias
        if scheme.input_activations is not None:
            scale = None if input_scale is None else float(input_scale.float())
            activations[name] = {"args": scheme.input_activations.model_dump(mode="json"), "scale": scale}
    return tensors, activations


def make(
    name: str, scheme: str, groups: dict | list, ignore=("lm_head",), arch="llama", shape=None, config_edit=None,
    dtype=torch.bfloat16, modifier=QuantizationModifier, **options,
) -> None:  # fmt: skip
    seed = len(name) * 1000 + sum(map(ord, name))
    model = make_model(arch, dtype, seed, **(QUANTIZED_SHAPE | TIED | (shape or {})))
    groups = {f"group_{i}": entry for i, entry in enumerate(groups if isinstance(groups, list) else [groups])}
    recipe = modifier(config_groups=groups, ignore=list(ignore), **options)
    needs_data = modifier is GPTQModifier or any(
        entry["input_activations"] and not entry["input_activations"]["dynamic"] for entry in groups.values()
    )
    data = {}
    if needs_data:
        rows = calibration()
        dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": [[1] * rows.shape[1]] * len(rows)})
        data = {"dataset": dataset, "num_calibration_samples": len(rows), "max_seq_length": rows.shape[1]}
    model = AutoModelForCausalLM.from_pretrained(base_folder(name, model), dtype=dtype)
    oneshot(model=model, recipe=recipe, **data)
    folder = WORK / "saved" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_compressed=True)
    dense, activations = dequantize(folder)
    if config_edit is not None:
        config = json.loads((folder / "config.json").read_text())
        config_edit(config)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    meta = {"tool": "llmcompressor", "scheme": scheme, "versions": versions("llmcompressor", "compressed-tensors")}
    finish(name, folder, dense, meta, activations)


def regex_ignore(config: dict) -> None:
    """Put the recipe's patterns back: the tool expands them to names when it saves, older files keep them."""
    config["quantization_config"]["ignore"] = list(RE_IGNORE)


def old_dialect(config: dict) -> None:
    """As the first compressed-tensors files: the key `compression_config`, and no `format` inside a group."""
    quantization = config.pop("quantization_config")
    for entry in quantization["config_groups"].values():
        entry.pop("format", None)
    config["compression_config"] = quantization


RE_IGNORE = ("re:.*lm_head", r"re:model\.layers\.0\.self_attn\.o", "re:.*up_proj$")
LINEAR = ["Linear"]
ODD = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 20}  # k and v: N = 20
RAGGED = ODD | {"intermediate_size": 100}  # down_proj: K = 100, not a multiple of 8

CASES = {
    "ct-w8a16-g32": ("W8A16 g32 sym", group(LINEAR, weights(8, "group", group_size=32))),
    "ct-w8a16-g64-asym": ("W8A16 g64 asym", group(LINEAR, weights(8, "group", False, group_size=64))),
    "ct-w8a16-channel": ("W8A16 channel sym", group(LINEAR, weights(8, "channel")), {"config_edit": old_dialect}),
    "ct-w8a16-channel-asym": (
        "W8A16 channel asym, N = 20", group(LINEAR, weights(8, "channel", False)), {"shape": ODD}
    ),
    "ct-w4a16-channel": (
        "W4A16 channel sym, K = 100", group(LINEAR, weights(4, "channel")), {"shape": RAGGED, "dtype": torch.float16}
    ),
    "ct-w4a16-channel-asym": (
        "W4A16 channel asym, N = 20, K = 100", group(LINEAR, weights(4, "channel", False)), {"shape": RAGGED}
    ),
    "ct-w4a16-g32-asym": (
        "W4A16 g32 asym, N = 20", group(LINEAR, weights(4, "group", False, group_size=32)), {"shape": ODD}
    ),
    "ct-w4a16-g64": ("W4A16 g64 sym", group(LINEAR, weights(4, "group", group_size=64)), {"dtype": torch.float16}),
    "ct-w4a16-g32-actorder-static": (
        "W4A16 g32 sym, GPTQ with actorder static",
        group(LINEAR, weights(4, "group", group_size=32, actorder="static")),
        {"modifier": GPTQModifier},
    ),
    "ct-fp8-ignore-re": (
        "FP8 channel, dynamic token; ignore by regular expressions",
        group(LINEAR, weights(8, "channel", kind="float"), dynamic_token("float")),
        {"ignore": RE_IGNORE, "config_edit": regex_ignore},
    ),
    "ct-fp8-tensor-dynamic": (
        "FP8 weights per tensor, dynamic token, qwen2 with qkv bias",
        group(LINEAR, weights(8, "tensor", kind="float"), dynamic_token("float")),
        {"arch": "qwen2"},
    ),
    "ct-w8a8-static": (
        "INT8 weights per channel, static per tensor", group(LINEAR, weights(8, "channel"), static_tensor("int"))
    ),
    "ct-fp8-block": (
        "FP8 in blocks of 128 x 128, inputs in runs of 128",
        group(
            LINEAR,
            weights(8, "block", kind="float", block_structure=[128, 128]),
            {**dynamic_token("float"), "strategy": "group", "group_size": 128},
        ),
        {"shape": {"intermediate_size": 256, "num_attention_heads": 2, "head_dim": 64}},
    ),
    "ct-mixed": (
        "mixed-precision: attention W4A16 g32, MLP FP8 dynamic",
        [
            group(["re:.*self_attn.*_proj$"], weights(4, "group", group_size=32)),
            group(["re:.*mlp.*_proj$"], weights(8, "channel", kind="float"), dynamic_token("float")),
        ],
    ),
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        scheme, groups, *rest = CASES[case]
        make(case, scheme, groups, **(rest[0] if rest else {}))
