"""A ring of tiles in shared memory, filled by asynchronous copies: what keeps enough bytes in flight to read memory at its roof.

Triton has no word for it. The addresses are those of PTX's shared window, in bytes; every lane of a tensor of one element a thread does its
own copies. PTX only. Copies of one `commit` arrive together; after `wait` and `meet`, every lane of the warps that met sees them.
"""

import triton
import triton.language as tl

RESERVE_STEP = tl.constexpr(16384)  # bytes that one more stage of `reserve` adds


@triton.jit
def shared_base():
    """Address of the program's dynamic shared memory, which `reserve` makes large enough."""
    return tl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def reserve(pointer, stages: tl.constexpr):
    """Code that must never run, but makes the program own `stages` x 16 KiB of shared memory: the operands of a pipelined product.

    A program cannot ask Triton for shared memory by size, and a static array in PTX ends at 48 KiB, too little to hide the latency of
    16 and more tokens. The launcher checks what was granted.
    """
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    product = tl.zeros([64, 64], tl.float32)
    for step in tl.range(0, 64, num_stages=stages):
        product = tl.dot(tl.load(pointer + at + step * 64), tl.load(pointer + at + step * 128), product)
    tl.store(pointer + at, product.to(pointer.dtype.element_ty))


@triton.jit
def copy_once(to, source, size):
    """16 bytes that nobody else reads soon: past L1, and the 256 bytes around them into L2. `size` 0 fills with zeros and reads nothing."""
    tl.inline_asm_elementwise(
        "cp.async.cg.shared.global.L2::256B [$1], [$2], 16, $3; mov.b32 $0, 0;",
        "=r,r,l,r", [to, source, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy_again(to, source, size, here):
    """16 bytes that other programs of the multiprocessor read too, where `here`; `size` 0 fills with zeros and reads nothing."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred here;
            setp.ne.b32 here, $4, 0;
            @here cp.async.ca.shared.global [$1], [$2], 16, $3;
            mov.b32 $0, 0;
        }""",
        "=r,r,l,r,r", [to, source, size, here.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy_past(to, source, here):
    """16 bytes past L1, where `here`: no other program of the multiprocessor reads them."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred here;
            setp.ne.b32 here, $3, 0;
            @here cp.async.cg.shared.global [$1], [$2], 16;
            mov.b32 $0, 0;
        }""",
        "=r,r,l,r", [to, source, here.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy_word(to, source):
    """4 bytes."""
    tl.inline_asm_elementwise(
        "cp.async.ca.shared.global [$1], [$2], 4; mov.b32 $0, 0;", "=r,r,l", [to, source], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def commit():
    """Ends a group of copies."""
    tl.inline_asm_elementwise("cp.async.commit_group; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _wait_asm(later):
    return f"cp.async.wait_group {later}; mov.b32 $0, 0;"


@triton.jit
def wait(later: tl.constexpr):
    """Until all groups but the latest `later` have arrived."""
    tl.inline_asm_elementwise(_wait_asm(later), "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def meet(party, warps: tl.constexpr):
    """A barrier of the `warps` warps of the same `party` (1 to 15)."""
    if warps == 1:
        tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        threads = party * 0 + warps * 32
        tl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [party, threads], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def meet_all():
    """A barrier of all warps of the program."""
    tl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def get_word(source):
    """4 bytes from shared memory."""
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [source], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def put_four(to, a, b, c, d):
    """Four fp32 to shared memory."""
    tl.inline_asm_elementwise(
        "st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;",
        "=r,r,f,f,f,f", [to, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def get_four(source):
    """Four fp32 from shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,r", [source], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip
