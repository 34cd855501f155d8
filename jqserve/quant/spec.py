"""What a quantized matrix is, apart from its arrays: `QuantSpec`, static, hashable, with a JSON round trip."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

QType = Literal["uint4", "nf4", "fp4", "int8", "uint8", "float8_e4m3fn"]
ZeroKind = Literal["none", "int", "offset"]
ActivationKind = Literal["none", "dynamic_token", "static_tensor", "dynamic_block"]

#: Bits a value takes in memory.
BITS: dict[str, int] = {"uint4": 4, "nf4": 4, "fp4": 4, "int8": 8, "uint8": 8, "float8_e4m3fn": 8}
#: The zero point of unsigned types when the tensor carries none: values are symmetric around it.
IMPLIED_ZERO: dict[str, int] = {"uint4": 8, "int8": 0, "uint8": 128, "float8_e4m3fn": 0}


@dataclasses.dataclass(frozen=True)
class ActivationSpec:
    """How the input of a matmul is quantized: scale = absmax / divisor, then round half to even and clamp.

    kind     none | dynamic_token (a scale per row) | static_tensor (`input_scale` of the checkpoint) |
             dynamic_block (a scale per `block` consecutive features of a row)
    qtype    float8_e4m3fn or int8; None when kind is none
    divisor  448 for float8_e4m3fn; int8: 127.5 as compressed-tensors defines it, 127 as SGLang's and vLLM's kernels do
    """

    kind: ActivationKind = "none"
    qtype: Literal["int8", "float8_e4m3fn"] | None = None
    divisor: float = 0.0
    block: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ActivationKind) or self.qtype not in (None, "int8", "float8_e4m3fn"):
            raise ValueError(f"unknown activation kind {self.kind!r} or type {self.qtype!r}")
        if (self.kind == "none") != (self.qtype is None) or (self.kind == "dynamic_block") != bool(self.block):
            raise ValueError(f"activation {self.kind!r} does not go with qtype {self.qtype!r}, block {self.block!r}")
        if self.kind != "none" and not self.divisor > 0:
            raise ValueError(f"activation {self.kind!r} needs a positive divisor, found {self.divisor!r}")


NO_ACTIVATION = ActivationSpec()


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """The static description of one quantized weight, in the orientation of a Hugging Face Linear: y = x @ W.T.

    qtype        storage type of one value; 4-bit values are stored two a byte, low nibble = even k
    shape        (N, K): output features, input features
    group_shape  (gn, gk): values that share a scale. (1, 128) group 128; (1, K) per channel; (N, K) per tensor;
                 (128, 128) blocks. Ragged last groups are allowed.
    nf4 and fp4 are codes: value = codebook[q] * scale (`quant.codebook`); they take no zero.
    zero         none: value = (q - IMPLIED_ZERO[qtype]) * scale
                 int: value = (q - zero_point) * scale, zero_point uint8 of the scale's shape
                 offset: value = (q - IMPLIED_ZERO[qtype]) * scale + zero_point, zero_point float
    activation   how the matmul quantizes its input
    layout       "canonical", or the name of a kernel layout of pallas_kernels
    """

    qtype: QType
    shape: tuple[int, int]
    group_shape: tuple[int, int]
    zero: ZeroKind = "none"
    activation: ActivationSpec = NO_ACTIVATION
    layout: str = "canonical"

    def __post_init__(self) -> None:
        if self.qtype not in BITS:
            raise ValueError(f"unknown qtype {self.qtype!r}; known: {', '.join(BITS)}")
        if self.zero not in get_args(ZeroKind):
            raise ValueError(f"unknown zero {self.zero!r}; known: {', '.join(get_args(ZeroKind))}")
        if self.codebook and self.zero != "none":
            raise ValueError(f"{self.qtype} is a code and takes no zero, found {self.zero!r}")
        if min(*self.shape, *self.group_shape) < 1:
            raise ValueError(f"shape {self.shape} and group_shape {self.group_shape} must be positive")

    @property
    def bits(self) -> int:
        return BITS[self.qtype]

    @property
    def codebook(self) -> bool:
        """Whether a value is a code, to be looked up."""
        return self.qtype in ("nf4", "fp4")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the canonical qvalue."""
        return -(-self.shape[1] * self.bits // 8)

    @property
    def group_size(self) -> int:
        """Values along K that share a scale."""
        return self.group_shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Shape of `scale`: (ceil(N / gn), ceil(K / gk))."""
        (n, k), (gn, gk) = self.shape, self.group_shape
        return -(-n // gn), -(-k // gk)

    def replace(self, **changes: Any) -> QuantSpec:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> QuantSpec:
        return QuantSpec(
            qtype=data["qtype"],
            shape=tuple(data["shape"]),
            group_shape=tuple(data["group_shape"]),
            zero=data["zero"],
            activation=ActivationSpec(**data["activation"]),
            layout=data["layout"],
        )
