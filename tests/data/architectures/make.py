"""Writes logits.npz and configs.json: what transformers' own models compute for `cases.MODELS`.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install torch transformers==5.17.0 numpy
    /tmp/peers/bin/python tests/data/architectures/make.py

Eager attention, float32, one thread. The JSON keeps each config.json as transformers wrote it, and the
parameter shapes.
"""

from __future__ import annotations

import json
from pathlib import Path

import cases
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent


def main() -> None:
    torch.set_num_threads(1)
    logits, configs = {}, {}
    for name, (model_type, changes) in cases.MODELS.items():
        config = transformers.AutoConfig.for_model(model_type, **(cases.COMMON | changes))
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
        state = {
            k: v for k, v in model.state_dict().items() if not (config.tie_word_embeddings and k == "lm_head.weight")
        }
        for key, tensor in state.items():
            tensor.copy_(torch.from_numpy(cases.weight(key, tuple(tensor.shape))))
        with torch.no_grad():
            out = model(torch.from_numpy(cases.tokens(name))[None].long()).logits[0]
        logits[name] = out.numpy()
        written = config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
        configs[name] = {"config": written, "shapes": {k: list(v.shape) for k, v in state.items()}}
        print(name, float(np.abs(logits[name]).max()))
    np.savez_compressed(HERE / "logits.npz", **logits)
    (HERE / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")


if __name__ == "__main__":
    main()
