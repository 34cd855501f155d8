"""The `config_groups` of compressed-tensors: which group a module belongs to, and the scheme its arguments describe."""

from __future__ import annotations

from typing import Any

from jqserve.checkpoint.fields import Fields
from jqserve.checkpoint.readers.compressed_tensors import EightBit, PackQuantized
from jqserve.checkpoint.readers.dense import DENSE
from jqserve.checkpoint.readers.fp8 import Fp8Block, block_size
from jqserve.checkpoint.readers.patterns import regex_matches
from jqserve.checkpoint.scheme import FP8_BLOCK, FP8_STATIC, FP8_TOKEN, INT8_STATIC, INT8_TOKEN, Scheme
from jqserve.errors import UnsupportedError
from jqserve.quant import NO_ACTIVATION, ActivationSpec
from jqserve.quant.spec import QType

FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
MODULE_CLASS = "Linear"


class CompressedTensorsPlan:
    """Names decide before classes, groups in the file's order, `ignore` before all (FORMATS.md 1.5).

    own_inputs: inputs will be quantized as our kernels do (`asked.OVERRIDES`), whatever the config says of a zero point
    """

    method = "compressed-tensors"

    def __init__(self, config: Fields, own_inputs: bool = False) -> None:
        status = config.text("quantization_status", "compressed")
        if status not in ("compressed", "frozen"):
            raise config.unsupported(
                "quantization_status",
                "'compressed', 'frozen': the weights are not quantized yet, save the model compressed",
            )
        for key in ("sparsity_config", "transform_config"):
            extra = config.child(key)
            if extra and extra.data and extra.data.get("format", "?") not in (None, "dense"):
                raise config.unsupported(key, "none (sparse and transformed weights are not read)")
        cache = config.child("kv_cache_scheme")
        if cache is not None:  # its scales would be taken for fp8's
            cache.one_of("type", ("float",), "float")
            cache.one_of("num_bits", (8,), 8)
        self.kv_cache_scheme = cache is not None
        groups = config.child("config_groups")
        if groups is None or not groups.data:
            raise config.error("config_groups", "at least one group")
        self._ignore = config.texts("ignore")
        self._where = config.where
        self._targets: list[tuple[str, Scheme]] = []
        top = config.text("format", None)
        for name in groups.data:
            group = groups.child(name)
            if group is None:
                raise groups.error(name, "a group")
            scheme = _scheme(group, top, own_inputs)
            targets = group.texts("targets")
            if not targets:
                raise group.error("targets", "module names, re: patterns or Linear")
            self._targets += [(target, scheme) for target in targets]

    def _names(self, entry: str, module: str) -> bool:
        if entry.startswith("re:"):
            return regex_matches(entry[3:], module, self._where)
        return entry == module

    def scheme(self, module: str) -> Scheme:
        return self._decide(module)[0]

    def why_dense(self, module: str) -> str:
        return self._decide(module)[1]

    def _decide(self, module: str) -> tuple[Scheme, str]:
        """(scheme, why it is dense or "")."""
        for entry in self._ignore:
            if self._names(entry, module) or entry == MODULE_CLASS:
                return DENSE, f"ignore has {entry!r}"
        for target, scheme in self._targets:
            if self._names(target, module):
                return scheme, ""
        for target, scheme in self._targets:
            if not target.startswith("re:") and target.lower() in MODULE_CLASS.lower():
                return scheme, ""
        return DENSE, "no group of config_groups targets it"


def _scheme(group: Fields, top_format: str | None, own_inputs: bool) -> Scheme:
    form = group.text("format", top_format)
    if form not in FORMATS:
        raise UnsupportedError(f"{group.where}: format: {form!r} is not supported; supported: {', '.join(FORMATS)}")
    if group.data.get("output_activations") is not None:
        raise group.unsupported("output_activations", "null")
    weights = group.child("weights")
    if weights is None:
        raise group.unsupported("weights", "quantized weights (a group of activations alone is not)")
    if weights.data.get("dynamic"):
        raise weights.unsupported("dynamic", "false")
    kind = weights.one_of("type", ("int", "float"), "int")
    if form == "naive-quantized":
        form = "float-quantized" if kind == "float" else "int-quantized"
    inputs = group.child("input_activations")
    if form == "pack-quantized":
        return _packed(group, weights, inputs, kind)
    if kind != form.removesuffix("-quantized"):
        raise weights.error("type", f"{form.removesuffix('-quantized')!r}, as the format is {form}")
    weights.one_of("num_bits", (8,))
    if weights.data.get("strategy") == "block":
        return _block(weights, inputs, kind)
    group_size = _group_size(weights, ("tensor", "channel", "group"))
    symmetric = weights.flag("symmetric", True)
    activation, static, asymmetric = _activation(inputs, kind, own_inputs)
    if inputs is not None and (group_size > 0 or not symmetric):
        raise weights.unsupported(
            "strategy" if group_size > 0 else "symmetric",
            "one symmetric scale a channel or a tensor, with quantized inputs",
        )
    if kind == "float" and not symmetric:
        raise weights.unsupported("symmetric", "true for float8")
    qtype: QType = "float8_e4m3fn" if kind == "float" else "int8"
    return EightBit(qtype, group_size, symmetric, static, asymmetric, activation)


def _block(weights: Fields, inputs: Fields | None, kind: str) -> Fp8Block:
    """FP8_BLOCK: weights in 128x128 blocks, inputs in groups of 128 features (or 16 bit)."""
    if kind != "float" or not weights.flag("symmetric", True):
        raise weights.unsupported("strategy", "'block' for symmetric float8 alone")
    block_size(weights, "block_structure")
    activation = NO_ACTIVATION
    if inputs is not None:
        inputs.one_of("type", ("float",))
        inputs.one_of("num_bits", (8,), 8)
        inputs.one_of("strategy", ("group",))
        inputs.one_of("group_size", (128,))
        if inputs.data.get("dynamic") is not True or not inputs.flag("symmetric", True):
            raise inputs.unsupported("dynamic", "true, symmetric, with weights in blocks")
        activation = FP8_BLOCK
    return Fp8Block("weight_scale", activation, "compressed-tensors float-quantized")


def _packed(group: Fields, weights: Fields, inputs: Fields | None, kind: str) -> PackQuantized:
    if kind != "int":
        raise weights.unsupported("type", "'int' in the pack-quantized format")
    if inputs is not None:
        raise group.unsupported("input_activations", "null with pack-quantized weights")
    bits = weights.one_of("num_bits", (4, 8))
    size = _group_size(weights, ("channel", "group"))
    order = weights.data.get("actorder")
    if order not in (None, False, True, "group", "weight", "static", "dynamic"):
        raise weights.unsupported("actorder", "null, 'group', 'weight', 'static'")
    # "weight" and "static" order the work, not the file. True is how early versions wrote "group".
    return PackQuantized(bits, size, weights.flag("symmetric", True), order in (True, "group", "dynamic"))


def _group_size(weights: Fields, strategies: tuple[str, ...]) -> int:
    """0 = one scale a tensor, -1 = one a channel, else values of K a scale."""
    size = weights.integer("group_size", None, minimum=-1)
    strategy = weights.data.get("strategy")
    if strategy is None:  # compressed-tensors' own default
        strategy = "tensor" if size is None else ("channel" if size == -1 else "group")
    if strategy not in strategies:
        raise weights.unsupported("strategy", ", ".join(map(repr, strategies)))
    if strategy == "group":
        if size is None or size < 1:
            raise weights.error("group_size", "a positive group size, as the strategy is group")
        return size
    if size not in (None, -1):
        raise weights.error("group_size", f"null, as the strategy is {strategy}")
    return 0 if strategy == "tensor" else -1


def _activation(inputs: Fields | None, kind: str, own: bool) -> tuple[ActivationSpec, bool, bool]:
    """-> (what to do with the input, whether the file stores input_scale, and input_zero_point)."""
    if inputs is None:
        return NO_ACTIVATION, False, False
    found = inputs.one_of("type", ("int", "float"), "int")
    if found != kind or inputs.integer("num_bits", 8) != 8:
        raise inputs.unsupported("type", f"8-bit {kind!r}, as the weights have")
    symmetric = inputs.flag("symmetric", True)
    dynamic: Any = inputs.data.get("dynamic", False)
    strategy = inputs.data.get("strategy") or ("token" if dynamic else "tensor")
    if dynamic is True and strategy == "token":
        if not symmetric and not own:
            flag = "; --quantization w8a8_int8 serves it without a zero point" if kind == "int" else ""
            raise inputs.unsupported("symmetric", f"true{flag}")
        return (FP8_TOKEN if kind == "float" else INT8_TOKEN), False, False
    if dynamic is False and strategy == "tensor":
        return (FP8_STATIC if kind == "float" else INT8_STATIC), True, not symmetric
    raise UnsupportedError(
        f"{inputs.where}: dynamic {dynamic!r} with strategy {strategy!r} is not supported; supported: dynamic true "
        "with strategy 'token', dynamic false with strategy 'tensor'"
    )
