"""Reference logits of every case: an ordinary fp32 transformers model, eager attention, on the dequantized weights.

Run with the compressed-tensors environment; arguments: case names, or none for all that have dequantized weights.
"""

from __future__ import annotations

import functools
import json
import sys
import zlib

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file
from tiny import CASES, VOCAB, WORK
from transformers import AutoConfig, AutoModelForCausalLM

LENGTHS = (33, 17, 9, 5)
GREEDY_STEPS = 16


def plain_model(name: str, **overrides) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(CASES / name)
    for key in ("quantization_config", "compression_config"):
        if hasattr(config, key):
            delattr(config, key)
    for key, value in overrides.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    dense = load_file(WORK / "dense" / name / "dense.safetensors")
    missing, unexpected = model.load_state_dict(dense, strict=False)
    if config.tie_word_embeddings:
        missing = [key for key in missing if key != "lm_head.weight"]
        model.tie_weights()
    if missing or unexpected:
        raise SystemExit(f"{name}: missing {missing}, unexpected {unexpected}")
    return model


class Noise:
    """Relative size of the noise put on every quantized input: it stands for another engine's order of summation."""

    scale = 0.0
    generator = torch.Generator().manual_seed(0)


def quantize_input(module: torch.nn.Module, inputs: tuple, args: QuantizationArgs, scale: float | None) -> tuple:
    (x,) = inputs
    if Noise.scale:
        size = Noise.scale * x.abs().amax(-1, keepdim=True)
        x = x + size * torch.randn(x.shape, generator=Noise.generator)
    if scale is None:
        scales, zero = compute_dynamic_scales_and_zp(value=x, args=args, module=module)
    else:
        scales, zero = torch.tensor([scale], dtype=torch.float32), None
    return (fake_quantize(x=x, scale=scales, zero_point=zero, args=args),)


@torch.no_grad()
def outputs(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [S, V], and ids and margins [16] of the greedy continuation, each step from the whole sequence."""
    ids = torch.tensor(prompt, dtype=torch.long)[None]
    logits = model(ids, use_cache=False).logits[0].numpy()
    greedy, margins = [], []
    for _ in range(GREEDY_STEPS):
        top = torch.topk(model(ids, use_cache=False).logits[0, -1], 2)
        greedy.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        ids = torch.cat([ids, top.indices[:1][None]], dim=1)
    return logits, np.array(greedy, np.int32), np.array(margins, np.float32)


@torch.no_grad()
def stable(model: torch.nn.Module, prompt: np.ndarray, logits: np.ndarray, greedy: np.ndarray) -> bool:
    """No activation lies so near a rounding border that another order of summation moves it across."""
    ids = torch.tensor(np.concatenate([prompt, greedy]), dtype=torch.long)[None]
    clean = model(ids, use_cache=False).logits[0].numpy()
    Noise.scale = 3e-7
    noisy = [model(ids, use_cache=False).logits[0].numpy() for _ in range(6)]  # two missed a tie in ct-fp8-block
    Noise.scale = 0.0
    return max(np.abs(other - clean).max() for other in noisy) < 1e-3 * np.abs(logits).max()


def quantize_activations(model: torch.nn.Module, activations: dict) -> list:
    handles = []
    for module, entry in activations.items():
        args = QuantizationArgs.model_validate(entry["args"])
        hook = functools.partial(quantize_input, args=args, scale=entry["scale"])
        handles.append(model.get_submodule(module).register_forward_pre_hook(hook))
    return handles


def choose_prompt(model: torch.nn.Module, rng: np.random.Generator, length: int, activations: dict) -> np.ndarray:
    """Random ids; with quantized activations, the first draw whose rounding is stable."""
    handles = quantize_activations(model, activations)
    for _ in range(400):
        prompt = rng.integers(3, VOCAB, length, dtype=np.int32)
        if not activations:
            break
        logits, greedy, _ = outputs(model, prompt)
        if stable(model, prompt, logits, greedy):
            break
    else:
        raise SystemExit("no prompt with stable rounding in 400 draws")
    for handle in handles:
        handle.remove()
    return prompt


def make_reference(name: str) -> None:
    work = WORK / "dense" / name
    meta = json.loads((work / "meta.json").read_text())
    activations = json.loads((work / "activations.json").read_text())
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    lengths = meta.pop("prompt_lengths", LENGTHS)
    model = plain_model(name)
    prompts = [choose_prompt(model, rng, length, activations) for length in lengths]
    arrays = {f"prompt_{i}": prompt for i, prompt in enumerate(prompts)}
    variants = ["wdq"] + (["qdq"] if activations else [])
    for variant in variants:
        if variant == "qdq":
            quantize_activations(model, activations)
        for i, prompt in enumerate(prompts):
            logits, greedy, margins = outputs(model, prompt)
            assert np.isfinite(logits).all()
            arrays |= {
                f"logits_{variant}_{i}": logits.astype(np.float16),
                f"greedy_{variant}_{i}": greedy,
                f"margin_{variant}_{i}": margins,
            }
    np.savez_compressed(CASES / name / "ref.npz", **arrays)
    absmax = max(float(np.abs(arrays[f"logits_wdq_{i}"]).max()) for i in range(len(prompts)))
    meta["logit_absmax"] = absmax
    if without := meta.pop("without", None):
        other, _, _ = outputs(plain_model(name, **without), prompts[0])
        gap = float(np.abs(other - arrays["logits_wdq_0"].astype(np.float32)).max()) / absmax
        meta["ignored_feature_of_absmax"] = gap
        assert gap > 0.02, f"{name}: a reader that ignores {without} is off by only {gap}"
    if activations:
        gaps = [
            np.abs(arrays[f"logits_wdq_{i}"].astype(np.float32) - arrays[f"logits_qdq_{i}"].astype(np.float32)).max()
            for i in range(len(prompts))
        ]
        meta["qdq_vs_wdq_of_absmax"] = float(max(gaps)) / absmax
    (CASES / name / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    size = sum(path.stat().st_size for path in (CASES / name).iterdir())
    gaps = {key: round(value, 4) for key, value in meta.items() if key.endswith("absmax")}
    print(f"{name:34s} {size:7d} B  {gaps}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:] or sorted(path.name for path in (WORK / "dense").iterdir()):
        make_reference(case)
