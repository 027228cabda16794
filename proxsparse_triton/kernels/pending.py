"""A program's list of blocks that wait for the hard solver, in shared memory.

Where some blocks of a tile are hard, a warp that solves them at once idles in all other lanes. So each tile only notes which they are, and
they are solved afterwards, a full warp at a time. Programs of one warp with one block a lane, which the layout of 16-byte accesses
gives; PTX only. The compiler must keep each `push` once: tests/kernels/test_compile.py counts them.
"""

import triton
import triton.language as tl

CAPACITY = tl.constexpr(256)  # as in `pending_list`


@triton.jit
def pending_list():
    """Address of the list, an empty one; call once."""
    return tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 pending[256]; mov.u32 $0, pending; }", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def push(address, count, block, pending):
    """Appends the numbers `block` where `pending` to a list of `count` (the same in all lanes); returns the new count."""
    return tl.inline_asm_elementwise(
        """{
            .reg .pred here;
            .reg .b32 all, place;
            setp.ne.s32 here, $4, 0;
            vote.sync.ballot.b32 all, here, 0xffffffff;
            mov.u32 place, %lanemask_lt;
            and.b32 place, place, all;
            popc.b32 place, place;
            add.s32 place, place, $2;
            shl.b32 place, place, 2;
            add.s32 place, place, $1;
            @here st.shared.b32 [place], $3;
            popc.b32 all, all;
            add.s32 $0, $2, all;
        }""",
        "=&r,r,r,r,r", [address, count, block, pending.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def at(address, place):
    """The numbers at `place`, after all lanes have pushed."""
    return tl.inline_asm_elementwise(
        """{
            .reg .b32 where;
            bar.warp.sync 0xffffffff;
            shl.b32 where, $2, 2;
            add.s32 where, where, $1;
            ld.shared.b32 $0, [where];
        }""",
        "=r,r,r", [address, place], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
