"""Cases that transformers quantizes and saves by itself, with logits and greedy continuations of a plain model, as
`reference.py` makes them, without compressed-tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from tiny import CASES, QUANTIZED_SHAPE, VOCAB, WORK, make_model

KEPT = ("config.json", "generation_config.json", "model.safetensors")
SHAPE = QUANTIZED_SHAPE | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
LENGTHS = (33, 17, 9, 5)
GREEDY_STEPS = 16


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


def make_case(
    name: str, config: Any, seed: int, dequantized: Callable[[torch.nn.Module], torch.Tensor], **versions: str
) -> None:
    """What transformers saves of a tiny Llama under `config`, and ref.npz of a plain fp32 model over the weights
    [N, K] that `dequantized` gives of each Linear but the head. versions: of the tool, beside torch's."""
    plain = make_model("llama", seed=seed, **SHAPE)
    source, saved, case = WORK / "base" / name, WORK / "saved" / name, CASES / name
    for folder in (source, saved, case):
        shutil.rmtree(folder, ignore_errors=True)
    plain.save_pretrained(source)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    quantized.save_pretrained(saved)
    model = make_model("llama", torch.float32, seed=seed, **SHAPE)
    model.config._attn_implementation = "eager"
    state = {key: value.float() for key, value in plain.state_dict().items()}
    for path, module in quantized.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            state[f"{path}.weight"] = dequantized(module)
    model.load_state_dict(state)
    model.tie_weights()
    rng, found = np.random.default_rng(5), {}
    for i, length in enumerate(LENGTHS):
        prompt = rng.integers(3, VOCAB, length, dtype=np.int32)
        logits, greedy, margin = outputs(model, prompt)
        found |= {f"prompt_{i}": prompt, f"logits_wdq_{i}": logits.astype(np.float16)}
        found |= {f"greedy_wdq_{i}": greedy, f"margin_wdq_{i}": margin}
    case.mkdir(parents=True)
    for file in KEPT:
        shutil.copyfile(saved / file, case / file)
    np.savez_compressed(case / "ref.npz", **found)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__} | versions
    tool = {"bnb": "bitsandbytes"}.get(prefix := name.partition("-")[0], prefix)
    (case / "meta.json").write_text(json.dumps({"tool": tool, "scheme": name, "versions": versions}))
    print(name, sum(path.stat().st_size for path in case.iterdir()), "bytes")
