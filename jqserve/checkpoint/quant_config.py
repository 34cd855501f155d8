"""config.json -> the quantization plan: a method that names the scheme of every Linear. No tensor is looked at.

Where the facts stand: `quantization_config`; `compression_config` (compressed-tensors before 0.6);
`quantize_config.json` (AutoGPTQ) or `quant_config.json` (llm-awq, early AutoAWQ) beside a config without either.
"""

from __future__ import annotations

from typing import Protocol

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.gguf_checkpoint import GgufCheckpoint
from jqserve.checkpoint.open import AnyCheckpoint
from jqserve.checkpoint.readers.awq import AwqPlan
from jqserve.checkpoint.readers.bitsandbytes import BitsAndBytesPlan
from jqserve.checkpoint.readers.compressed_tensors_plan import CompressedTensorsPlan
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.readers.fp8 import Fp8Plan
from jqserve.checkpoint.readers.gptq import GptqPlan
from jqserve.checkpoint.readers.torchao import TorchaoPlan
from jqserve.checkpoint.scheme import Scheme
from jqserve.errors import CheckpointError, UnsupportedError

SUPPORTED = "awq, gptq, compressed-tensors, fp8, bitsandbytes, torchao, a .gguf file, or no quantization_config at all"
NOT_QUANTIZED = "the checkpoint is not quantized"
#: Methods that people have; each with what to do instead.
REFUSED = {
    "fbgemm_fp8": "use a compressed-tensors FP8 checkpoint",
    "modelopt": "use a compressed-tensors FP8 checkpoint",
    "quark": "use a compressed-tensors checkpoint",
    "mxfp4": "4-bit floats are not read yet",
}


class QuantPlan(Protocol):
    """What a method's config says. `scheme` takes the module's Hugging Face name, unfused."""

    @property
    def method(self) -> str: ...

    def scheme(self, module: str) -> Scheme: ...

    def why_dense(self, module: str) -> str:
        """Why the module's scheme is `DENSE`, in words of the config; "" where it is another."""
        ...


class Unquantized:
    """No quantization_config: every Linear is dense."""

    method = "none"

    def scheme(self, module: str) -> Scheme:
        return DENSE

    def why_dense(self, module: str) -> str:
        return NOT_QUANTIZED


def quant_plan(checkpoint: AnyCheckpoint, *, own_inputs: bool = False) -> QuantPlan:
    """The plan of a checkpoint directory. own_inputs: see `CompressedTensorsPlan`.

    Raises UnsupportedError for an unknown method or variant (nothing is ever loaded as if it were not quantized),
    CheckpointError for a config that contradicts itself or the file beside it.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.plan
    where = str(checkpoint.path / "config.json")
    config = Fields(checkpoint.config, where)
    found = config.child("quantization_config")
    default = None
    if found is None:
        found, default = config.child("compression_config"), "compressed-tensors"
        nested = found.child("quantization_config") if found else None
        found = nested or found
    beside = checkpoint.optional_json("quantize_config.json")
    if found is None and beside is not None:
        found, default = Fields(beside, str(checkpoint.path / "quantize_config.json")), "gptq"
    elif found is None:
        old_awq = checkpoint.optional_json("quant_config.json")
        if old_awq is None:
            if (theirs := checkpoint.path / "hf_quant_config.json").exists():  # config.json of such a file says nothing
                raise UnsupportedError(f"{theirs}: modelopt's is not supported: {REFUSED['modelopt']}")
            return Unquantized()
        found, default = Fields(old_awq, str(checkpoint.path / "quant_config.json")), "awq"
    method = found.text("quant_method", default)
    if not method:
        raise CheckpointError(f"{found.where}: quant_method is missing; supported: {SUPPORTED}")
    if method == "gptq":
        if beside is not None and found.data is not beside:
            _compare(found, Fields(beside, str(checkpoint.path / "quantize_config.json")))
        return GptqPlan(found)
    if method == "awq":
        return AwqPlan(found)
    if method in ("compressed-tensors", "compressed_tensors"):
        return CompressedTensorsPlan(found, own_inputs)
    if method == "fp8":
        return Fp8Plan(found)
    if method == "bitsandbytes":
        return BitsAndBytesPlan(found)
    if method == "torchao":
        return TorchaoPlan(found)
    reason = f": {REFUSED[method]}" if method in REFUSED else ""
    raise UnsupportedError(f"{found.where}: quant_method {method!r} is not supported{reason}; supported: {SUPPORTED}")


def _compare(config: Fields, beside: Fields) -> None:
    """The two files of a GPTQ checkpoint state the same facts; where they differ, one of them lies about the bits."""
    for key in ("bits", "group_size", "sym", "checkpoint_format", "format", "dynamic"):
        one, other = config.data.get(key), beside.data.get(key)
        if one is not None and other is not None and one != other:
            raise CheckpointError(
                f"{key}: {config.where} says {one!r}, {beside.where} says {other!r}; correct or remove the wrong one"
            )
