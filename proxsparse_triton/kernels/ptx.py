"""What Triton has no word for: single PTX instructions, each beside its meaning in plain Triton for the interpreter and AMD's cards."""

import torch
import triton
import triton.language as tl

PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


@triton.jit
def reciprocal(x):
    """1 / x to 1 ulp; 1 / 0 is inf, and numbers below 2^-126 count as 0."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1 / x


@triton.jit
def halves(pair):
    """A pair of bf16 in 32 bits -> (lower, upper) in fp32. As PTX the compiler does not see bits, and an absolute value is free."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=f,=f,r", [pair], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def upper_halves(low, high):
    """fp32 -> their upper 16 bits, bf16 towards zero, as a pair in 32 bits."""
    if PTX:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (high.to(tl.int32, bitcast=True) & -65536)


@triton.jit
def nearest_bf16(x):
    """fp32 -> the nearest bf16, to even, as fp32; by its bits, since the interpreter's cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even."""
    if not PTX and dtype == tl.bfloat16:
        x = nearest_bf16(x)
    return x.to(dtype)


@triton.jit
def nearest_pair(low, high):
    """fp32 -> the nearest bf16, to even, as a pair in 32 bits."""
    if PTX:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return upper_halves(nearest_bf16(low), nearest_bf16(high))


@triton.jit
def signed_pair(low, high, signs):
    """max(low, 0) and max(high, 0) rounded to the nearest bf16 as a pair, with the signs of the pair `signs`, but +0.0 for all zeros.

    A product with +-1 and a sum with +0.0 turn -0.0 into +0.0. NaN stays NaN.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 magnitude, sign;
                cvt.rn.relu.bf16x2.f32 magnitude, $2, $1;
                lop3.b32 sign, $3, 0x80008000, 0x3F803F80, 0xEA;
                mov.b32 $0, 0;
                fma.rn.bf16x2 $0, magnitude, sign, $0;
            }""",
            "=&r,f,f,r", [low, high, signs], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low_sign, high_sign = halves(signs)
        return upper_halves(signed(nearest_bf16(low), low_sign), signed(nearest_bf16(high), high_sign))


@triton.jit
def signed(magnitude, sign):
    """max(magnitude, 0) with the sign of `sign`, but +0.0 for zero. NaN stays NaN, though a maximum on the card would drop it."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
                .reg .f32 kept, one;
                max.NaN.f32 kept, $1, 0f00000000;
                lop3.b32 one, $2, 0x80000000, 0x3F800000, 0xEA;
                fma.rn.f32 $0, kept, one, 0f00000000;
            }""",
            "=f,f,f", [magnitude, sign], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        kept = tl.where(magnitude > 0, magnitude, 0.0)
        kept = tl.where(magnitude == magnitude, kept, magnitude).to(tl.int32, bitcast=True)
        return (kept | (sign.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True) + 0.0


@triton.jit
def half_pair(low, high):
    """fp32 -> the nearest fp16, as a pair in 32 bits."""
    if PTX:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        high = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return (low & 0xFFFF) | (high << 16)


@triton.jit
def half_values(pair):
    """A pair of fp16 in 32 bits -> (lower, upper) in fp32."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
                .reg .b16 low, high;
                mov.b32 {low, high}, $2;
                cvt.f32.f16 $0, low;
                cvt.f32.f16 $1, high;
            }""",
            "=f,=f,r", [pair], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
