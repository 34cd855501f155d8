"""Writes ties.npz: how the reference runs behind `ref.npz` rounded the activations that lie on a rounding boundary.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install torch transformers==5.17.0 safetensors numpy
    /tmp/peers/bin/python tests/data/activation_ties/make.py ../shared/fixtures [NAME ...]    default: all

Activation quantization is chaotic: an input of a Linear that is within float32 noise of the middle between two int8
(fp8) values falls on either side, and one such step moves the logits by a per cent and more, at its position and at all
later ones. Torch itself, run on another CPU than the one that made ref.npz, leaves the bounds that way. So the test
takes those decisions, and only those, from the reference. They are found by running the fixture's model in torch with
compressed-tensors' definition (FORMATS.md 1.4) and collecting every value within 1.5e-6 (of its row's largest) of a
boundary. Where that run does not give ref.npz's logits, its own ties are turned over, nearest first, until it does:
on an AMD EPYC one of 655 had to be, a row's extreme at -127.5 in ct-w8a8-int8. In fp8-block the inputs are quantized in
runs of 128 (FORMATS.md 4), in ct-fp8-kv keys (after the rotation) and values as well (1.6): their ties are found alike.

ties.npz, per fixture and prompt, name "<fixture>/<prompt>": int32 [n, 4] of (call, position, feature, q), where call
counts the quantized inputs in order (q/k/v, o, gate/up, down of each layer) and q is the int8 value or the fp8 byte;
"<fixture>/<prompt>/kv" likewise, where call counts keys and values in turn, and feature is head * 64 + dimension.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

FIXTURES = (
    "ct-fp8-dynamic",
    "ct-fp8-static",
    "ct-w8a8-int8",
    "arch-mistral-sw-ct-fp8-dynamic",
    "fp8-block",
    "ct-fp8-kv",
)
BLOCK = 128
NEAR = 1.5e-6  # of a row's largest value: float32 noise of a Linear's input is 3e-7 of it, in rare rows 2e-6
SMALL = 0.25  # in quantized units; below, a step of fp8 is at most 1/64 where 448 is the largest: it changes nothing
KV = 1000  # the first call of keys and values
CALLS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class Quantizer:
    """The forward pre-hook of every Linear but the head: quantizes, dequantizes, notes ties, obeys `forced`."""

    def __init__(self, int8: bool, block: bool) -> None:
        self.int8, self.block = int8, block
        self.static: dict[str, torch.Tensor] = {}
        self.forced: dict[tuple[int, int, int], float] = {}
        self.ties: dict[tuple[int, int, int], tuple[float, float, float]] = {}  # -> chosen, other, distance
        self.kv_scales: dict[tuple[int, str], torch.Tensor] = {}  # by layer and "k" or "v"

    def round(self, y: torch.Tensor) -> torch.Tensor:
        if self.int8:
            return torch.round(torch.clamp(y, -128, 127))
        return torch.clamp(y, -448, 448).to(torch.float8_e4m3fn).float()

    def __call__(self, module: torch.nn.Module, args: tuple, name: str) -> tuple[torch.Tensor]:
        (x,) = args
        if name in self.static:
            scale = self.static[name]
        else:
            runs = x.unflatten(-1, (-1, BLOCK if self.block else x.shape[-1])).abs().amax(-1)
            scale = runs / torch.tensor(127.5 if self.int8 else 448.0)
            scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
            scale = scale.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)
        layer, short = name.removeprefix("model.layers.").split(".", 1)
        head, _, leaf = short.rpartition(".")
        call = 4 * int(layer) + CALLS.index(f"{head}.{SAME_INPUT.get(leaf, leaf)}")
        return (self.through(x, scale, call),)

    def key_or_value(self, x: torch.Tensor, layer: int, kind: str) -> torch.Tensor:
        """[1, heads, S, D] through the fp8 cache, for checkpoints with its scales."""
        scale = self.kv_scales.get((layer, kind))
        if scale is None:
            return x
        rows = x.transpose(1, 2).flatten(2)  # [1, S, heads * D]
        stored = self.through(rows, scale, KV + 2 * layer + (kind == "v"))
        return stored.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)

    def through(self, x: torch.Tensor, scale: torch.Tensor, call: int) -> torch.Tensor:
        """Quantized and back: x [1, S, K]."""
        y = x / scale
        q = self.round(y)
        step = NEAR * x.abs().amax(-1, keepdim=True) / scale
        low, high = self.round(y - step), self.round(y + step)
        for _, position, k in ((low != high) & (y.abs() >= SMALL)).nonzero().tolist():
            chosen = float(q[0, position, k])
            other = float(low[0, position, k]) if chosen == float(high[0, position, k]) else float(high[0, position, k])
            distance = abs(float(y[0, position, k]) - (chosen + other) / 2)
            self.ties[call, position, k] = (chosen, other, distance)
        for (at, position, k), value in self.forced.items():
            if at == call:
                q[0, position, k] = value
        return q * scale


def load(directory: Path) -> tuple[torch.nn.Module, Quantizer]:
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config")
    parsed = AutoConfig.for_model(config.pop("model_type"), **config)
    parsed._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(parsed).float().eval()
    tensors = load_file(directory / "model.safetensors")
    quantizer = Quantizer("int8" in directory.name, "block" in directory.name)
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("input_scale"):
            quantizer.static[name.removesuffix(".input_scale")] = tensor.float()
        elif name.endswith((".k_scale", ".v_scale")):
            quantizer.kv_scales[int(name.split(".")[2]), name[-7]] = tensor.float()
        elif not name.endswith(("_scale", "_scale_inv")):
            scale = tensors.get(f"{name}_scale", tensors.get(f"{name}_scale_inv"))
            if scale is not None and quantizer.block:
                scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            state[name] = tensor.float() if scale is None else tensor.float() * scale.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}

    eager = modeling_llama.eager_attention_forward

    def attention(
        module: torch.nn.Module, query: object, key: torch.Tensor, value: torch.Tensor, *a: object, **k: object
    ):
        layer = module.layer_idx
        key, value = quantizer.key_or_value(key, layer, "k"), quantizer.key_or_value(value, layer, "v")
        return eager(module, query, key, value, *a, **k)

    if quantizer.kv_scales:
        modeling_llama.eager_attention_forward = attention
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(functools.partial(quantizer, name=name))
    return model, quantizer


def errors(model: torch.nn.Module, quantizer: Quantizer, prompt: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Per position: largest |difference| to the reference over its largest |logit|."""
    quantizer.ties.clear()
    with torch.no_grad():
        got = model(torch.from_numpy(prompt)[None].long()).logits[0].numpy()
    return np.abs(got - expected).max(-1) / np.abs(expected).max()


def settle(model: torch.nn.Module, quantizer: Quantizer, prompt: np.ndarray, expected: np.ndarray) -> None:
    """Turns ties over until the run gives the reference's logits."""
    while (bad := np.flatnonzero(errors(model, quantizer, prompt, expected) > 1e-3)).size:
        first = int(bad[0])
        ties = {key: tie for key, tie in quantizer.ties.items() if key[1] == first and key not in quantizer.forced}
        for key in sorted(ties, key=lambda key: ties[key][2]):
            quantizer.forced[key] = ties[key][1]
            if errors(model, quantizer, prompt, expected)[first] <= 1e-3:
                print("   turned over", key, ties[key])
                break
            del quantizer.forced[key]
        else:
            raise SystemExit(f"no single tie at position {first} explains the reference")


def main() -> None:
    torch.set_num_threads(1)
    path = Path(__file__).with_name("ties.npz")
    out = dict(np.load(path)) if path.exists() else {}
    for name in sys.argv[2:] or FIXTURES:
        directory = Path(sys.argv[1]) / name
        model, quantizer = load(directory)
        reference = np.load(directory / "ref.npz")
        for i in range(4):
            quantizer.forced = {}
            expected = reference[f"logits_qdq_{i}"].astype(np.float32)
            settle(model, quantizer, reference[f"prompt_{i}"], expected)
            rows, kv = [], []
            for (call, position, k), (chosen, _, _) in sorted(quantizer.ties.items()):
                value = quantizer.forced.get((call, position, k), chosen)
                byte = int(value) if quantizer.int8 else torch.tensor(value).to(torch.float8_e4m3fn).view(torch.uint8)
                (rows if call < KV else kv).append((call % KV, position, k, int(byte)))
            out[f"{name}/{i}"] = np.array(rows, np.int32).reshape(-1, 4)
            if quantizer.kv_scales:
                out[f"{name}/{i}/kv"] = np.array(kv, np.int32).reshape(-1, 4)
            print(name, i, len(rows), len(kv), "ties")
    np.savez_compressed(path, **out)


if __name__ == "__main__":
    main()
