"""Tiny decoder models with explicit random weights: the same numbers whatever the transformers version."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch

VOCAB = 64
CASES = Path(__file__).resolve().parents[1] / "peer_cases"
WORK = Path(os.environ.get("PEER_WORK", "/tmp/peers/work"))
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
#: 49 thousand parameters in the layer; 4 heads of 16 with hidden 128, so head_dim is not hidden / heads.
QUANTIZED_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
DENSE_SHAPE = QUANTIZED_SHAPE | {"hidden_size": 64}


def _draw(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Weights whose rows and columns differ in size, so that a misplaced scale shows in the logits."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    value = rng.standard_normal(tuple(shape))
    if name.endswith("bias"):
        return torch.tensor(0.3 * value, dtype=torch.float32)
    if "norm" in name:
        return torch.tensor(1 + 0.2 * value, dtype=torch.float32)
    if "embed" in name:
        return torch.tensor(0.3 * value, dtype=torch.float32)
    gain = 0.5 if ("down_proj" in name or "o_proj" in name) else 1.3
    value *= gain / np.sqrt(shape[1])
    value *= np.exp(0.4 * rng.standard_normal((shape[0], 1))) * np.exp(0.3 * rng.standard_normal((1, shape[1])))
    return torch.tensor(value, dtype=torch.float32)


def make_model(arch: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0, edit=None, **config):
    """A transformers model of `arch`; `edit(name, tensor)` may change a weight before it is rounded to `dtype`."""
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in CLASSES[arch])
    common = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = model_class(config_class(**(common | config)))
    seen = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = _draw(name, parameter.shape, seed)
            if edit is not None:
                value = edit(name, value)
            parameter.copy_(value)
            seen.add(name)
    model.tie_weights()
    model = model.to(dtype)
    model.config.torch_dtype = dtype  # version 4 reads this name, version 5 redirects it
    return model.eval()


def calibration(rows: int = 32, length: int = 64, seed: int = 7) -> np.ndarray:
    """Random token ids [rows, length] int32."""
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, length), dtype=np.int32)


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer `t0 t1 ...`, for the tools that insist on one; it is not kept in the case."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", bos_token="t1", eos_token="t2")
    fast.save_pretrained(folder)


def base_folder(name: str, model) -> Path:
    """Save the unquantized model with a tokenizer under WORK, as the input of a tool that reads a folder."""
    folder = WORK / "base" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def finish(name: str, saved: Path, dense: dict[str, torch.Tensor], meta: dict, activations: dict | None = None) -> None:
    """Copy what the tool saved into the case and leave the dequantized weights (fp32) for reference.py.

    activations: module -> {"args": QuantizationArgs fields of compressed-tensors, "scale": float or None}
    """
    from safetensors.torch import save_file

    target = CASES / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(saved.iterdir()):
        keep = path.suffix in (".safetensors", ".json") and not path.name.startswith(("tokenizer", "special_tokens"))
        if keep and path.name != "recipe.yaml":
            shutil.copyfile(path, target / path.name)
    work = WORK / "dense" / name
    work.mkdir(parents=True, exist_ok=True)
    save_file({key: value.float().contiguous().clone() for key, value in dense.items()}, work / "dense.safetensors")
    (work / "activations.json").write_text(json.dumps(activations or {}))
    (work / "meta.json").write_text(json.dumps(meta, indent=1))


def versions(*packages: str) -> dict[str, str]:
    """Versions of the installed packages, torch and transformers among them."""
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", "transformers", "safetensors", *packages)}
