"""A Hugging Face checkpoint directory becomes the canonical parameter tree; format names end here.

The walk: `hub` (which directory) -> `hf` + `safetensors_file` (headers, lazy reads) -> `model_config`, `quant_config`
(what config.json says) -> `audit` (what the headers say, and that both agree) -> `readers` (raw tensors ->
canonical arrays) -> `fuse` (q/k/v, gate/up) -> `convert` (the loop, module by module) -> `store` (Orbax, optional).
"""
