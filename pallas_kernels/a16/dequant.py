"""Packed words -> operand A of the tensor core, by bit patterns instead of conversions.

The number 2^7 + u (bf16, u < 128) or 2^10 + u (fp16, u < 1024) is the magic word's bits with u in the mantissa, so
AND and OR (one LOP3) make it and one packed subtraction takes the magic number and the zero point off again, exactly:
every value is an integer below 2^8.

`words(kind)` 32-bit words per lane hold 16 rows x 16 columns; each function returns the four registers a0..a3
(a0, a2 of row g, a1, a3 of row g + 8).
"""

from __future__ import annotations

from pallas_kernels.a16.ptx import Int, lop3_and_or, packed, prmt
from pallas_kernels.a16.stored import Kind

MAGIC = {"bf16": 0x4300, "f16": 0x6400}  # 128.0 and 1024.0


def both(half: int) -> int:
    """A 16-bit pattern in both halves of a word."""
    return half << 16 | half


def zero_pair(kind: Kind, dtype: str, zeros: Int, high: bool) -> Int:
    """Byte 0 (row g) or byte 1 (row g + 8) of `zeros` -> what `DEQUANT` subtracts, in both halves of a word.

    u4: magic + zero (0..15). s8: the zero itself, -128..127, whose difference with a value is exact in 9 bits.
    """
    byte = 1 if high else 0
    # prmt picks bytes: 0..3 of zeros, 4..7 of the other word.
    if kind.name == "u4":
        return prmt(zeros, Int.of(both(MAGIC[dtype])), 0x5050 | byte << 8 | byte)
    return _signed(dtype, prmt(zeros, Int.of(0), 0x4040 | byte << 8 | byte))


def _signed(dtype: str, word: Int) -> Int:
    """int8 in the low byte of each half: the low seven bits minus 128 where the sign bit is set.

    Under the magic number that bit turns 128 into 256 (bf16's exponent) or 1024 into 1152 (fp16's mantissa).
    """
    magic = both(MAGIC[dtype])
    return packed("sub", dtype, lop3_and_or(word, both(0x7F), magic), lop3_and_or(word, both(0x80), magic))


def u4(dtype: str, words: list[Int], zeros: tuple[Int, Int] | None) -> list[Int]:
    """Values u - zero; `zeros` are (row g, row g + 8) words of `zero_pair`; None is 8."""
    magic = both(MAGIC[dtype])
    low, high = zeros or (Int.of(magic + both(8)),) * 2
    out = []
    for i in range(4):
        word = lop3_and_or(words[0] >> (4 * i), both(15), magic)
        out.append(packed("sub", dtype, word, (low, high)[i % 2]))
    return out


# What `raised_u4` adds to every value: the magic number and the implied zero point.
LIFT = {"bf16": 136.0, "f16": 1032.0}


def raised_u4(dtype: str, words: list[Int]) -> list[Int]:
    """Values u + magic, one instruction less each; a kernel takes LIFT times sum x off the product of u - 8.

    The sums are some 30 times larger meanwhile, so that float32 keeps 19 of its 24 bits; bf16 has 8.
    """
    return [lop3_and_or(words[0] >> (4 * i), both(15), both(MAGIC[dtype])) for i in range(4)]


def s8(dtype: str, words: list[Int], zeros: tuple[Int, Int] | None) -> list[Int]:
    """int8 value, minus the zero of its row where there is one."""
    out = []
    for i in range(4):
        value = _signed(dtype, words[i // 2] >> (8 * (i % 2)))
        out.append(packed("sub", dtype, value, zeros[i % 2]) if zeros else value)
    return out


def e4m3(dtype: str, words: list[Int], zeros: tuple[Int, Int] | None) -> list[Int]:
    """fp8: exponent and mantissa moved into place, then multiplied by the difference of the exponents' biases."""
    assert zeros is None
    shift = 4 if dtype == "bf16" else 1
    bias = both(0x7B80 if dtype == "bf16" else 0x5C00)  # 2^120, 2^8
    out = []
    for i in range(4):
        word = words[i // 2] if i % 2 else words[i // 2] << 8
        rest = (word & both(0x7F00)) >> shift
        out.append(packed("mul", dtype, Int.of(_sign_or(word, rest)), Int.of(bias)))
    return out


def _sign_or(word: Int, rest: Int) -> Int:
    return (word & both(0x8000)) | rest


DEQUANT = {"u4": u4, "s8": s8, "e4m3": e4m3}
