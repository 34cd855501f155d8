"""What a weight's spec decides on a device, without jax: its layout, whether a kernel takes it, what is refused."""

from __future__ import annotations

from jqserve.errors import UnsupportedError
from jqserve.ops.device import Device
from jqserve.quant import QuantSpec
from pallas_kernels.w4a16 import choice as w4a16
from pallas_kernels.w8a16 import choice as w8a16


def has_kernel(spec: QuantSpec) -> bool:
    """Whether some device has a kernel for weights of this kind, whatever their groups."""
    return not spec.codebook and not (spec.bits == 8 and spec.zero == "offset")


def preferred_layout(spec: QuantSpec, device: Device) -> str:
    """The layout's name; "canonical" where the kernels read canonical arrays, as scaled_matmul always does, and where
    there is no kernel."""
    if spec.activation.kind != "none" or not has_kernel(spec):
        return "canonical"
    n, k = spec.shape
    choice = w4a16 if spec.qtype == "uint4" else w8a16
    return choice.preferred_layout(n, k, spec.group_size, spec.zero, device)


def needs_generic(spec: QuantSpec, device: Device) -> bool:
    """Whether no kernel on `device` multiplies by weights of this spec as they are."""
    if spec.activation.kind != "none":
        return False
    return not has_kernel(spec) or (device.platform != "cpu" and preferred_layout(spec, device) == "canonical")


def rows_as_they_are(spec: QuantSpec) -> bool:
    """Whether the grid has a row for each output feature, or one value for all, as weight-only kernels take it."""
    (n, k), (gn, gk) = spec.shape, spec.group_shape
    return gn == 1 or (gn >= n and gk >= k)


def check_supported(path: str, spec: QuantSpec) -> None:
    """Raises UnsupportedError, naming module `path`, when no kernel multiplies by a weight of this scheme."""
    (n, k), (gn, gk) = spec.shape, spec.group_shape
    reason = None
    if spec.activation.kind == "none":
        return
    if spec.qtype not in ("int8", "float8_e4m3fn"):
        reason = f"{spec.qtype} weights with quantized activations (supported: int8 and float8_e4m3fn weights)"
    elif spec.activation.qtype != spec.qtype:
        reason = f"{spec.qtype} weights with {spec.activation.qtype} activations (supported: the same type for both)"
    elif spec.zero != "none":
        reason = "asymmetric weights with quantized activations (supported: symmetric weights)"
    elif not (gk >= k and (gn == 1 or gn >= n)) and (gn, gk) != (128, 128):
        reason = f"weight scales per {gn}x{gk} with quantized activations (supported: per channel, per tensor, 128x128)"
    if reason:
        raise UnsupportedError(
            f"{path}: no kernel for {reason}. Load it with activations='none' (--activations none) to serve the "
            "weights alone, or choose a checkpoint in a supported scheme"
        )
