"""What a format's reader knows about one Linear: the tensors it needs, its `QuantSpec`, and how to decode it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jqserve.errors import CheckpointError
from jqserve.quant import NO_ACTIVATION, ActivationSpec, QuantSpec
from jqserve.quant.namespace import namespace as namespace

Arrays = dict[str, Any]
FP8_TOKEN = ActivationSpec("dynamic_token", "float8_e4m3fn", 448.0)
FP8_STATIC = ActivationSpec("static_tensor", "float8_e4m3fn", 448.0)
#: compressed-tensors divides the range 255 by two (its `calculate_qparams`); kernels elsewhere take 127.
INT8_TOKEN = ActivationSpec("dynamic_token", "int8", 127.5)
#: What SGLang's and vLLM's int8 kernels do, and `--quantization w8a8_int8`.
INT8_TOKEN_127 = ActivationSpec("dynamic_token", "int8", 127.0)
#: DeepSeek-V3: a scale for each 128 consecutive features of a token.
FP8_BLOCK = ActivationSpec("dynamic_block", "float8_e4m3fn", 448.0, 128)
INT8_STATIC = ActivationSpec("static_tensor", "int8", 127.5)

FLOATS = ("BF16", "F16", "F32")
#: Suffixes of weight scales, whatever the format.
SCALES = ("scales", "weight_scale", "weight_scale_inv", "_weight_scale", "s")


@dataclasses.dataclass(frozen=True)
class Need:
    """A tensor of a module: any of `dtypes` (safetensors' words) and any of `shapes`."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A module after the host's part: small tensors checked, large ones untouched in `arrays` for `Scheme.decode`."""

    arrays: Arrays
    perm: np.ndarray | None = None  # int32 [K]
    input_scale: np.ndarray | None = None  # float32 [1, 1]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to store a Linear, as config.json describes it. Subclasses are frozen, hashable and free of arrays.

    The order of calls: `check(n, k)` and `needs(n, k)` against the headers; `prepare` on the host, where the values of
    the small tensors (group indices, zero points, scales) are checked; `decode`, pure array arithmetic that runs in
    numpy or, under jit, on the device.
    """

    @property
    def method(self) -> str:
        """The format's name, for the plan."""
        raise NotImplementedError

    @property
    def narrow_bits(self) -> int | None:
        """Bits of a value in the file where the spec holds it in more, for want of a kernel; None: as the spec says."""
        return None

    def spec(self, n: int, k: int) -> QuantSpec | None:
        """What the module becomes; None for a dense one."""
        raise NotImplementedError

    def misfit(self, n: int, k: int) -> str:
        """Why a module of this shape stays unquantized all the same, for the plan; "" where it does not."""
        return ""

    def check(self, where: str, n: int, k: int) -> None:
        """Raises CheckpointError for a shape that the format cannot hold."""

    def needs(self, n: int, k: int) -> dict[str, Need]:
        """suffix -> Need, for everything but the bias."""
        raise NotImplementedError

    def prepare(self, where: str, raw: Mapping[str, np.ndarray], n: int, k: int) -> Prepared:
        """Raw tensors by suffix -> what `decode` takes. Raises CheckpointError naming `where` and the tensor."""
        raise NotImplementedError

    def decode(self, arrays: Arrays, n: int, k: int) -> tuple[Any, Any, Any]:
        """arrays -> (qvalue, scale, zero_point or None), canonical; a dense module gives (weight, None, None)."""
        raise NotImplementedError

    def scale_dtype(self, stored: Mapping[str, str]) -> str:
        """The dtype of the canonical scale, from the safetensors dtypes of the module's tensors by suffix."""
        found = [word for suffix, word in stored.items() if suffix in SCALES]
        return {"BF16": "bfloat16", "F16": "float16"}.get(found[0], "float32") if found else "float32"

    def with_activation(self, activation: ActivationSpec) -> Scheme:
        """The same with the input quantized in another way; a scheme that leaves it alone stays as it is."""
        if getattr(self, "activation", NO_ACTIVATION) == NO_ACTIVATION:
            return self
        return dataclasses.replace(self, activation=activation)  # type: ignore[call-arg]

    def without_activation(self) -> Scheme:
        """The same with the input left unquantized (`--activations none`)."""
        return self.with_activation(NO_ACTIVATION)


def cast(array: Any, dtype: str) -> Any:
    """array.astype(dtype), without numpy's copy where nothing changes. What does not fit becomes infinite without a
    warning: `Stream` looks for that, and names the module."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def transposed(array: Any) -> Any:
    """array.T with its rows contiguous, which numpy does not do unasked."""
    return np.ascontiguousarray(array.T) if namespace(array) is np else array.T


def group_count(k: int, group: int) -> int:
    return -(-k // group)


def ungrouped(k: int, group: int) -> str:
    """The `misfit` of a K that groups do not divide."""
    return f"not quantized: {k} in features are no multiple of the group of {group}"


def uneven(n: int, k: int) -> str:
    """The `misfit` of torchao's fp8 x fp8; "" where 16 divides both sides."""
    return f"not quantized: torchao's fp8 x fp8 takes multiples of 16, not {n} x {k}" if n % 16 or k % 16 else ""


def finite(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """`array` itself, or CheckpointError where a value is NaN or infinite."""
    if not np.isfinite(array.astype(np.float32)).all():
        raise CheckpointError(f"{where}.{name}: has values that are not finite; the file is damaged")
    return array


def static_input_scale(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """A stored scale of shape () or (1,) -> float32 [1, 1]; it must be positive."""
    scale = finite(where, name, array).astype(np.float32).reshape(1, 1)
    if scale[0, 0] <= 0:
        raise CheckpointError(f"{where}.{name}: an input scale must be positive, found {scale[0, 0]}")
    return scale


def grid_f32(scale: Any, spec: QuantSpec) -> Any:
    """A per-channel or per-tensor scale, stored as (), (1,) or [N, 1], as float32 of the spec's grid (exact)."""
    return scale.astype(namespace(scale).float32).reshape(spec.grid)


def act_order(where: str, name: str, g_idx: np.ndarray, k: int, group: int) -> np.ndarray | None:
    """The permutation that sorts columns by group: int32 [K], or None where they are in order or g_idx is all -1.

    Raises CheckpointError when an index is out of range, or groups do not have `group` members each: the canonical
    form has no place for such a tensor.
    """
    if (g_idx == -1).all():
        return None
    groups = group_count(k, group)
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(
            f"{where}.{name}: group indices run from {g_idx.min()} to {g_idx.max()}, expected 0 to {groups - 1}"
        )
    if np.array_equal(g_idx, np.arange(k, dtype=g_idx.dtype) // group):
        return None
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[perm], np.arange(k, dtype=g_idx.dtype) // group):
        raise CheckpointError(f"{where}.{name}: the groups do not have {group} columns each, which is not supported")
    return perm
