"""Writes ties.npz: how the reference runs behind `ref.npz` rounded the activations that lie on a rounding boundary.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install torch transformers==5.17.0 safetensors numpy
    /tmp/peers/bin/python tests/data/activation_ties/make.py ../shared/fixtures

Activation quantization is chaotic: an input of a Linear that is within float32 noise of the middle between two int8
(fp8) values falls on either side, and one such step moves the logits by a per cent and more, at its position and at all
later ones. Torch itself, run on another CPU than the one that made ref.npz, leaves the bounds that way. So the test
takes those decisions, and only those, from the reference. They are found by running the fixture's model in torch with
compressed-tensors' definition (FORMATS.md 1.4) and collecting every value within 1.5e-6 (of its row's largest) of a
boundary. Where that run does not give ref.npz's logits, its own ties are turned over, nearest first, until it does:
on an AMD EPYC one of 655 had to be, a row's extreme at -127.5 in ct-w8a8-int8.

ties.npz, per fixture and prompt, name "<fixture>/<prompt>": int32 [n, 4] of (call, position, feature, q), where call
counts the quantized inputs in order (q/k/v, o, gate/up, down of each layer) and q is the int8 value or the fp8 byte.
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

FIXTURES = ("ct-fp8-dynamic", "ct-fp8-static", "ct-w8a8-int8", "arch-mistral-sw-ct-fp8-dynamic")
NEAR = 1.5e-6  # of a row's largest value: float32 noise of a Linear's input is 3e-7 of it, in rare rows 2e-6
SMALL = 0.25  # in quantized units; below, a step of fp8 is at most 1/64 where 448 is the largest: it changes nothing
CALLS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class Quantizer:
    """The forward pre-hook of every Linear but the head: quantizes, dequantizes, notes ties, obeys `forced`."""

    def __init__(self, int8: bool) -> None:
        self.int8 = int8
        self.static: dict[str, torch.Tensor] = {}
        self.forced: dict[tuple[int, int, int], float] = {}
        self.ties: dict[tuple[int, int, int], tuple[float, float, float]] = {}  # -> chosen, other, distance

    def round(self, y: torch.Tensor) -> torch.Tensor:
        if self.int8:
            return torch.round(torch.clamp(y, -128, 127))
        return torch.clamp(y, -448, 448).to(torch.float8_e4m3fn).float()

    def __call__(self, module: torch.nn.Module, args: tuple, name: str) -> tuple[torch.Tensor]:
        (x,) = args
        if name in self.static:
            scale = self.static[name]
        else:
            scale = x.abs().amax(-1, keepdim=True) / torch.tensor(127.5 if self.int8 else 448.0)
            scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        y = x / scale
        q = self.round(y)
        layer, short = name.removeprefix("model.layers.").split(".", 1)
        head, _, leaf = short.rpartition(".")
        call = 4 * int(layer) + CALLS.index(f"{head}.{SAME_INPUT.get(leaf, leaf)}")
        step = NEAR * y.abs().amax(-1, keepdim=True)
        low, high = self.round(y - step), self.round(y + step)
        for _, position, k in ((low != high) & (y.abs() >= SMALL)).nonzero().tolist():
            chosen = float(q[0, position, k])
            other = float(low[0, position, k]) if chosen == float(high[0, position, k]) else float(high[0, position, k])
            distance = abs(float(y[0, position, k]) - (chosen + other) / 2)
            self.ties[call, position, k] = (chosen, other, distance)
        for (at, position, k), value in self.forced.items():
            if at == call:
                q[0, position, k] = value
        return (q * scale,)


def load(directory: Path) -> tuple[torch.nn.Module, Quantizer]:
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config")
    parsed = AutoConfig.for_model(config.pop("model_type"), **config)
    parsed._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(parsed).float().eval()
    tensors = load_file(directory / "model.safetensors")
    quantizer = Quantizer("int8" in directory.name)
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("input_scale"):
            quantizer.static[name.removesuffix(".input_scale")] = tensor.float()
        elif not name.endswith("_scale"):
            scale = tensors.get(f"{name}_scale")
            state[name] = tensor.float() if scale is None else tensor.float() * scale.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
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
    out = {}
    for name in FIXTURES:
        directory = Path(sys.argv[1]) / name
        model, quantizer = load(directory)
        reference = np.load(directory / "ref.npz")
        for i in range(4):
            quantizer.forced = {}
            expected = reference[f"logits_qdq_{i}"].astype(np.float32)
            settle(model, quantizer, reference[f"prompt_{i}"], expected)
            rows = []
            for (call, position, k), (chosen, _, _) in sorted(quantizer.ties.items()):
                value = quantizer.forced.get((call, position, k), chosen)
                byte = int(value) if quantizer.int8 else torch.tensor(value).to(torch.float8_e4m3fn).view(torch.uint8)
                rows.append((call, position, k, int(byte)))
            out[f"{name}/{i}"] = np.array(rows, np.int32).reshape(-1, 4)
            print(name, i, len(rows), "ties")
    np.savez_compressed(Path(__file__).with_name("ties.npz"), **out)


if __name__ == "__main__":
    main()
