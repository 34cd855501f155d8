"""The device that ops are traced for. A static argument of every inner jit: JAX's trace cache does not know of it."""

from pallas_kernels.dispatch import KNOWN_DEVICES, Device, current_device, use_device

__all__ = ["KNOWN_DEVICES", "Device", "current_device", "use_device"]
