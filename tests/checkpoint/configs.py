"""quantization_config objects as the tools write them, for tests."""

from __future__ import annotations

from typing import Any


def gptq(
    bits: int = 4, group: int = 128, sym: bool = True, desc_act: bool = False, v2: bool = False, **more: Any
) -> dict:
    form = "gptq_v2" if v2 else "gptq"
    base = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": desc_act}
    return {**base, "checkpoint_format": form, "format": form, "lm_head": False, "pack_dtype": "int32", **more}


def awq(group: int = 128, **more: Any) -> dict:
    base = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return {**base, "modules_to_not_convert": None, **more}


def weights(
    bits: int, kind: str, strategy: str, group: int | None = None, sym: bool = True, actorder: Any = None
) -> dict:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "group_size": group,
        "symmetric": sym,
        "dynamic": False,
        "actorder": actorder,
    }


def inputs(kind: str, static: bool = False, sym: bool = True) -> dict:
    strategy = "tensor" if static else "token"
    return {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": sym, "dynamic": not static}


def compressed(form: str, w: dict, a: dict | None = None, **more: Any) -> dict:
    group = {"targets": ["Linear"], "weights": w, "input_activations": a, "output_activations": None, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {"group_0": group},
        **more,
    }


def fp8(scheme: str = "dynamic", **more: Any) -> dict:
    return {"quant_method": "fp8", "activation_scheme": scheme, **more}
