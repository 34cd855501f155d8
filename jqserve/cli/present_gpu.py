"""Which GPU is in this machine, for a plan: as NVIDIA's driver writes it under /proc, without jax or nvidia-smi."""

from __future__ import annotations

from pathlib import Path

from pallas_kernels import KNOWN_DEVICES

DRIVER = Path("/proc/driver/nvidia/gpus")
DEFAULT = "h200"


def planned_device(asked: str | None, driver: Path | None = None) -> tuple[str, str]:
    """(the name in KNOWN_DEVICES to plan for, a warning or ""): the one asked for, else this machine's first GPU, else
    DEFAULT. A GPU of another kind is never taken for its nearest relation, whose memory may be twice as large."""
    if asked is not None:
        return asked, ""
    kind = _kind(driver or DRIVER)
    if kind is None:
        return DEFAULT, ""
    name = next((name for name, device in KNOWN_DEVICES.items() if device.kind == kind), None)
    if name is not None:
        return name, ""
    return DEFAULT, f"this machine's {kind} has no data sheet here: planned for {DEFAULT}, --device names another"


def _kind(driver: Path) -> str | None:
    """ "NVIDIA H100 80GB HBM3", as jax calls it too; None where no driver tells."""
    for path in sorted(driver.glob("*/information")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "Model" and value.strip():
                return value.strip()
    return None
