"""README's support matrix: which kernel a scheme's product takes on which device, and how far that was tried.

Asked of the same dispatch that serves, for a [4096, 4096] Linear at 1 and at 1,024 rows; nothing runs.
"""

from __future__ import annotations

from jqserve.ops.kernels import GENERIC, kernel
from jqserve.quant import QuantSpec
from jqserve.quant.spec import ActivationSpec
from pallas_kernels.dispatch import KNOWN_DEVICES

SIZE = 4096
_FP8 = ActivationSpec("dynamic_token", "float8_e4m3fn", 448.0)
_FP8_BLOCK = ActivationSpec("dynamic_block", "float8_e4m3fn", 448.0, 128)
_INT8 = ActivationSpec("dynamic_token", "int8", 127.5)
SCHEMES: dict[str, QuantSpec | None] = {
    "bf16, fp16, fp32": None,
    "4-bit, symmetric (GPTQ, W4A16), groups": QuantSpec("uint4", (SIZE, SIZE), (1, 128)),
    "4-bit, zero points (AWQ, GPTQ), groups": QuantSpec("uint4", (SIZE, SIZE), (1, 128), "int"),
    "4-bit, float offset (torchao int4wo)": QuantSpec("uint4", (SIZE, SIZE), (1, 128), "offset"),
    "8-bit weights (GPTQ 8, W8A16)": QuantSpec("uint8", (SIZE, SIZE), (1, 128)),
    "FP8 W8A8, per channel and token": QuantSpec("float8_e4m3fn", (SIZE, SIZE), (1, SIZE), activation=_FP8),
    "FP8 W8A8, 128 x 128 blocks": QuantSpec("float8_e4m3fn", (SIZE, SIZE), (128, 128), activation=_FP8_BLOCK),
    "INT8 W8A8, per channel and token": QuantSpec("int8", (SIZE, SIZE), (1, SIZE), activation=_INT8),
    "nf4, fp4 (bitsandbytes), 8-bit with a float offset (GGUF Q5_1, Q5_K)": QuantSpec("nf4", (SIZE, SIZE), (1, 64)),
    "groups that no kernel takes (of 40, say)": QuantSpec("uint4", (SIZE, SIZE), (1, 40)),
}
#: column -> (devices whose answers must agree, what was run there)
COLUMNS = {
    "H100, H200: run": ("h200", "h100"),
    "A100, L4, L40S, B200: never run": ("a100", "l4", "l40s", "b200"),
    "CPU: run by the tests": ("cpu",),
}


def support_rows() -> list[list[str]]:
    """[scheme, a cell per column]; cells: the kernel at decode, and at prefill where it is another one."""
    rows = []
    for label, spec in SCHEMES.items():
        cells = [label]
        for devices in COLUMNS.values():
            answers = {
                tuple(_short(kernel(spec, m, "bfloat16", "bfloat16", KNOWN_DEVICES[d])) for m in (1, 1024))
                for d in devices
            }
            assert len(answers) == 1, f"{label}: {devices} differ: {answers}"
            decode, prefill = answers.pop()
            cells.append(decode if decode == prefill else f"{decode}, prefill {prefill}")
        rows.append(cells)
    return rows


def _short(name: str) -> str:
    if name == GENERIC:
        return "generic"
    op, _, implementation = name.partition("/")
    return "XLA" if implementation == "xla" or op.startswith("dot_general") else name
