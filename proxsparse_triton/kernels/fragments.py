"""The sparse tensor cores' product of a 16 x 32 tile of 2:4 weights and 8 tokens, and how its operands lie in the lanes of a warp.

Lane 4g + t, g = 0..7, t = 0..3, holds (two 16-bit numbers to a register, the lower column in the lower half)

    weights   a0, a1, a2, a3   values (g, 2t..), (g + 8, 2t..), (g, 8 + 2t..), (g + 8, 8 + 2t..)  of 16 rows x 16 kept columns
    x         b0, b1, b2, b3   columns 2t.., 8 + 2t.., 16 + 2t.., 24 + 2t..  of token g
    sums      c0, c1, c2, c3   (row g, token 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)  in fp32
    metadata  e                row g's word in the lower half, row g + 8's in the upper; a word is 16 columns, a nibble i0 | i1 << 2 a block

Two tiles side by side are 64 columns, four words a row: lane t of a quad holds the words of columns 16t to 16t + 15, and `HALF` says
whether lanes 0, 1 (columns 0 to 31) or 2, 3 (columns 32 to 63) of each quad are read. Source: PTX ISA, "Matrix fragments for mma.sp".
"""

import triton
import triton.language as tl

from .ptx import PTX


@triton.constexpr_function
def _mma_asm(dtype, half):
    kind = "bf16" if dtype == tl.bfloat16 else "f16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, "
        f"{{$4, $5, $6, $7}}, {{$8, $9, $10, $11}}, {{$12, $13, $14, $15}}, $16, {half};"
    )


@triton.jit
def mma_24(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """c + weights @ x of one tile; all warps of the program do one each."""
    if PTX:
        return tl.inline_asm_elementwise(
            _mma_asm(DTYPE, HALF),
            "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
            [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return plain_mma_24(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e, DTYPE, HALF)


@triton.jit
def plain_mma_24(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """The same in plain Triton: spread the values over dense tiles, multiply, add."""
    WARPS: tl.constexpr = a0.shape[0] // 32
    values = tl.join(tl.join(quad(a0, DTYPE), quad(a1, DTYPE)), tl.join(quad(a2, DTYPE), quad(a3, DTYPE)))  # warp g t i row column
    values = tl.reshape(tl.permute(values, (0, 4, 1, 5, 2, 3)), [WARPS, 16, 8, 2])  # warp, row, block, which of the two kept
    x = tl.join(tl.join(quad(b0, DTYPE), quad(b2, DTYPE)), tl.join(quad(b1, DTYPE), quad(b3, DTYPE)))  # warp g t i, 8s, 16s
    x = tl.reshape(tl.permute(x, (0, 1, 4, 5, 2, 3)), [WARPS, 8, 8, 4])  # warp, token, block, column
    words = tl.reshape(e, [WARPS, 8, 2, 2])  # warp, g, half, lane of the half
    words = tl.sum(tl.where(tl.arange(0, 2)[None, None, :, None] == HALF, words, 0), axis=2)
    words = tl.permute(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (0, 3, 1, 2))  # warp, row // 8, g, 16 columns
    words = tl.reshape(words, [WARPS, 16, 2, 1, 1])
    nibble = words >> (tl.arange(0, 4)[None, None, None, :, None] * 4)
    position = tl.reshape((nibble >> (tl.arange(0, 2)[None, None, None, None, :] * 2)) & 3, [WARPS, 16, 8, 2])
    column = tl.arange(0, 4)[None, None, None, :, None]
    dense = tl.sum(tl.where(position[:, :, :, None, :] == column, values[:, :, :, None, :], 0.0), axis=4)  # warp, row, block, column
    product = tl.reshape(dense, [WARPS, 16, 1, 32]) * tl.reshape(x, [WARPS, 1, 8, 32])
    sums = tl.reshape(tl.sum(product, axis=3), [WARPS, 2, 8, 4, 2])  # warp, row // 8, g, t, token % 2
    upper, lower = tl.split(tl.permute(sums, (0, 2, 3, 4, 1)))
    d0, d1 = tl.split(upper)
    d2, d3 = tl.split(lower)
    LANES: tl.constexpr = [WARPS * 32]
    return c0 + tl.reshape(d0, LANES), c1 + tl.reshape(d1, LANES), c2 + tl.reshape(d2, LANES), c3 + tl.reshape(d3, LANES)


@triton.jit
def quad(pair, DTYPE: tl.constexpr):
    """Pairs of 16-bit numbers -> fp32 [warp, g, t, which of the pair]."""
    low = (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    high = ((pair >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(low, high), [pair.shape[0] // 32, 8, 4, 2])


@triton.jit
def load_matrices(source):
    """Four 8 x 8 matrices of 16-bit numbers from shared memory, lane i giving the address of row i % 8 of matrix i // 8; PTX only."""
    return tl.inline_asm_elementwise(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r", [source], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def hopper_metadata(source, odd):
    """Metadata of rows g and g + 8 from cuSPARSELt's order on Hopper in shared memory; PTX only.

    There 8 bytes hold 32 columns of both rows, nibble for nibble (g, b), (g + 8, b), (g, b + 4), (g + 8, b + 4) for b = 0..3: the lower
    bytes of the four words are blocks 0 to 3, the upper ones (`odd`) blocks 4 to 7, and the rows still alternate.
    """
    selector = tl.where(odd, 0x7531, 0x6420)
    mixed = tl.inline_asm_elementwise(
        """{
            .reg .b32 low, high;
            ld.shared.v2.b32 {low, high}, [$1];
            prmt.b32 $0, low, high, $2;
        }""",
        "=r,r,r", [source, selector], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return rows_apart(mixed)


@triton.jit
def rows_apart(mixed):
    """Even nibbles to the lower half, odd ones to the upper."""
    swap = (mixed ^ (mixed >> 4)) & 0x00F000F0
    mixed = mixed ^ swap ^ (swap << 4)
    swap = (mixed ^ (mixed >> 8)) & 0x0000FF00
    return mixed ^ swap ^ (swap << 8)
