"""What the user asked for, `--quantization` or `--torchao-config`, against what the checkpoint is.

Judged on the schemes of the modules (bits, dtype, granularity), never on names alone, before anything is loaded. A
flag quantizes an unquantized checkpoint, repeats what a quantized one is, overrides how its inputs are quantized
(w8a8_int8), or contradicts it: then UnsupportedError says what the checkpoint is, what was asked, and a command that
works.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Callable, Iterable
from typing import Any

from jqserve.checkpoint.online import ONLINE, TORCHAO, Online
from jqserve.checkpoint.plan import activation_text, input_text, scheme_text
from jqserve.checkpoint.scheme import FP8_TOKEN, INT8_TOKEN_127, Scheme
from jqserve.errors import UnsupportedError
from jqserve.quant import ActivationSpec, QuantSpec

#: The prefix under which a --torchao-config travels through the engine's `quantization` option.
TORCHAO_PREFIX = "torchao:"
#: Names that SGLang and vLLM give to formats -> our name of the format. Their kernels are not what runs here.
FORMATS = {
    "awq": "awq",
    "awq_marlin": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "marlin": "gptq",
    "compressed-tensors": "compressed-tensors",
    "compressed_tensors": "compressed-tensors",
    "torchao": "torchao",
    "gguf": "gguf",
}
#: Method of a model that is quantized while loading, before its scheme's name; `jqserve convert` keeps it.
ONLINE_METHOD = "online"
NOTHING = (None, "none", "auto")
CALIBRATED = ("awq", "gptq")
Test = Callable[[QuantSpec], bool]


def _dynamic(spec: QuantSpec, qtype: str) -> bool:
    """Per-channel weights and per-token inputs of one 8-bit type."""
    channel = spec.group_shape == (1, spec.shape[1])
    activation = spec.activation
    return spec.qtype == qtype and channel and activation.kind == "dynamic_token" and activation.qtype == qtype


def _weights(spec: QuantSpec, *qtypes: str) -> bool:
    return spec.qtype in qtypes and spec.activation.kind == "none"


#: scheme name -> (what it asks for, whether a quantized weight is that already)
SCHEMES: dict[str, tuple[str, Test]] = {
    "fp8": ("float8 weights and inputs", lambda s: s.qtype == "float8_e4m3fn" and s.activation.qtype == s.qtype),
    "w8a8_fp8": ("float8 weights per channel, inputs per token", lambda s: _dynamic(s, "float8_e4m3fn")),
    "fp8_block": (
        "float8 weights in 128x128 blocks, inputs in blocks of 128",
        lambda s: s.group_shape == (128, 128) and s.activation.kind == "dynamic_block",
    ),
    "w8a8_int8": ("int8 weights per channel, inputs per token", lambda s: _dynamic(s, "int8")),
    "int8": ("8-bit integer weights, 16-bit inputs", lambda s: _weights(s, "int8", "uint8")),
    "int4": ("4-bit integer weights, 16-bit inputs", lambda s: _weights(s, "uint4")),
    **{
        f"int4-{g}": (
            f"4-bit integer weights in groups of {g}, 16-bit inputs",
            lambda s, g=g: _weights(s, "uint4") and s.group_size == g,  # type: ignore[misc]
        )
        for g in (32, 64, 128, 256)
    },
    "bitsandbytes": ("bitsandbytes weights", lambda s: s.codebook),
}
#: Overrides: the config's ways with the input give way to our kernels' own; its ignore list stays.
OVERRIDES: dict[str, ActivationSpec] = {"w8a8_fp8": FP8_TOKEN, "w8a8_int8": INT8_TOKEN_127}


@dataclasses.dataclass(frozen=True)
class Answer:
    """online: quantize what is dense by this; activation: replaces that of every quantized module; note: for the plan
    and the log; alias: the flag is another's name of the format, and the engine logs what runs instead."""

    online: Online | None = None
    activation: ActivationSpec | None = None
    note: str = ""
    alias: bool = False

    def method(self, stored: str) -> str:
        """Of the model as it is loaded; stored: of the checkpoint."""
        return stored if self.online is None else f"{ONLINE_METHOD}: {self.online.name}"


def supported() -> str:
    return f"{', '.join(ONLINE)}; --torchao-config {', '.join(TORCHAO)}"


@dataclasses.dataclass(frozen=True)
class Stored:
    """One Linear of the checkpoint. spec: None for a dense one; words: its format ("gguf Q6_K"); bits: of a value in
    the file, where it is held in more (`Scheme.narrow_bits`)."""

    spec: QuantSpec | None
    words: str
    bits: int | None = None

    @staticmethod
    def of(scheme: Scheme, n: int, k: int) -> Stored:
        return Stored(scheme.spec(n, k), scheme.method, scheme.narrow_bits)


def answer(name: str | None, method: str, linears: Iterable[Stored], path: Any) -> Answer:
    """name     the flag; "torchao:NAME" for --torchao-config NAME
    method   of the checkpoint: "none", "awq", "online: fp8" (converted), ...
    linears  of the checkpoint
    path     its own, for the command that works

    Raises UnsupportedError: see above.
    """
    if name in NOTHING:
        return Answer()
    assert name is not None
    flag = flag_text(name)
    online = TORCHAO.get(name.removeprefix(TORCHAO_PREFIX)) if is_torchao(name) else ONLINE.get(name)
    if online is None and name not in FORMATS:
        raise UnsupportedError(
            f"{flag}: there is no such scheme{_near(name)}; on unquantized weights: {supported()}; a quantized "
            f"checkpoint needs no flag (its own names are taken: {', '.join(FORMATS)})"
        )
    stored = list(dict.fromkeys((s.spec, s.words, s.bits) for s in linears if s.spec is not None))
    found = [spec for spec, _, _ in stored if spec is not None]
    if method == "none" and found:  # converted before its method was kept
        method = ONLINE_METHOD
    if method == "none":
        return _on_dense(flag, name, online, path)
    kinds = list(dict.fromkeys(describe(words, spec) for spec, words, _ in stored if spec is not None))
    if method == "gguf" and not found and FORMATS.get(name) != method:  # a file of F16 or BF16 alone
        return _on_dense(flag, name, online, path)
    if name in FORMATS:
        if FORMATS[name] == method:
            return Answer(note=_alias(flag, name, method), alias=is_alias(name, method))
        article = "an" if FORMATS[name][0] in "aeiou" else "a"
        raise _contradiction(flag, f"{article} {FORMATS[name]} checkpoint", kinds, path)
    assert online is not None
    asks, test = SCHEMES.get(name, (f"torchao's {name.removeprefix(TORCHAO_PREFIX)}", None))
    if test is None:
        test = lambda spec: _same(spec, online.spec(*spec.shape))  # noqa: E731
    narrow = any(bits is not None for _, _, bits in stored)  # 3 bits held in 4 are not what --quantization int4 asks
    if name == method or (found and not narrow and all(test(spec) for spec in found)):
        activation = OVERRIDES.get(name) if method == "compressed-tensors" else None
        if activation is None or all(spec.activation == activation for spec in found):
            return Answer(note=f"{flag}: the checkpoint is that already ({'; '.join(kinds)})")
        how = activation_text(activation)
        return Answer(
            activation=activation, note=f"{flag}: inputs as our kernels quantize them, {how}; ignore list kept"
        )
    raise _contradiction(flag, asks, kinds, path)


def is_torchao(name: str | None) -> bool:
    return name is not None and name.startswith(TORCHAO_PREFIX)


def is_alias(name: str | None, method: str) -> bool:
    """Whether the flag names a kernel of other servers for the format `method`: awq_marlin for awq."""
    return name in FORMATS and FORMATS[name] == method and name not in (method, "compressed_tensors")


def flag_text(name: str) -> str:
    """The flag as the user writes it."""
    return f"--torchao-config {name.removeprefix(TORCHAO_PREFIX)}" if is_torchao(name) else f"--quantization {name}"


def describe(method: str, spec: QuantSpec) -> str:
    """ "gptq: uint4, groups of 128", "fp8: float8_e4m3fn, per tensor, inputs fp8 per token"."""
    method = method.partition(":")[0]
    text = scheme_text(method, spec)
    return text if spec.activation.kind == "none" else f"{text}, inputs {input_text(method, spec)}"


def check_something_fits(online: Online | None, slots: Iterable[tuple[str, int, int]], path: Any) -> None:
    """online: the scheme asked for, if any; slots: (name, n, k) of the Linears to quantize. Raises UnsupportedError
    where a scheme that leaves misfits dense would leave all of them dense: whoever asked for it would get, and measure,
    the unquantized model."""
    if online is None:
        return
    slots = list(slots)
    if not slots or any(online.spec(n, k) is not None for _, n, k in slots):
        return
    name, n, k = slots[0]
    raise UnsupportedError(
        f"{flag_text(online.name)}: none of the checkpoint's {len(slots)} Linears fits it: {name} would be "
        f"{online.misfit(n, k)}. `jqserve-server --model-path {shlex.quote(str(path))} --quantization int4` takes any "
        "size"
    )


def _near(name: str) -> str:
    """What a misspelt name, or one given to the other flag, may have meant: "fp-8", "--quantization int4wo-128"."""
    bare = lambda word: word.lower().replace("_", "").replace("-", "")  # noqa: E731
    flags = [{bare(x): x for x in (*FORMATS, *ONLINE)}, {bare(x): TORCHAO_PREFIX + x for x in TORCHAO}]
    own, other = reversed(flags) if is_torchao(name) else flags
    plain = bare(name.removeprefix(TORCHAO_PREFIX))
    plain = {"nf4": "bitsandbytes", "bnb": "bitsandbytes"}.get(plain, plain)
    near = difflib.get_close_matches(plain, own, n=1, cutoff=0.8)
    meant = own.get(plain) or other.get(plain) or (own[near[0]] if near else None)
    return f" (did you mean {flag_text(meant)}?)" if meant else ""


def _on_dense(flag: str, name: str, online: Online | None, path: Any) -> Answer:
    if online is not None:
        return Answer(online=online, note=f"quantized while loading: {flag}")
    kind = FORMATS[name]
    how = f"{kind} names a format of checkpoints: load one that is in it"
    if kind in CALIBRATED:  # where it can be done, `engine.calibrated` has opened the checkpoint as a quantized one
        how = (
            f"{kind} is calibrated on the weights of a Hugging Face directory, and this is none (or --load-format "
            f"dummy): `jqserve quantize --model-path ORIGINAL --scheme {kind} --out DIR`, then serve DIR"
        )
    raise UnsupportedError(
        f"{flag}: the checkpoint is not quantized; {how}; or round to nearest while loading: `jqserve-server "
        f"--model-path {shlex.quote(str(path))} --quantization int4` (on unquantized weights: {supported()})"
    )


def _same(spec: QuantSpec, wanted: QuantSpec | None) -> bool:
    return wanted is not None and spec.replace(layout="canonical") == wanted


def _alias(flag: str, name: str, method: str) -> str:
    if not is_alias(name, method):
        return f"{flag}: the checkpoint is that already"
    return f"{flag}: the checkpoint is {method}; the name is accepted, the kernels are jqserve's own (see the plan)"


def _contradiction(flag: str, asks: str, kinds: list[str], path: Any) -> UnsupportedError:
    return UnsupportedError(
        f"{flag} asks for {asks}, but the checkpoint is quantized already: {'; '.join(kinds) or 'nothing of it'}. "
        f"Leave the flag out: `jqserve-server --model-path {shlex.quote(str(path))}`; "
        "or give the flag with the unquantized original"
    )
