"""Hopper's tensor cores for a warpgroup: 64 rows of 2:4 weights by up to 256 tokens, both operands read from shared memory; and clusters.

The warps of a warpgroup hold 16 rows each, and their lanes metadata and sums as for `mma_24` (fragments.py), 8 tokens after 8 tokens. Both
operands lie in rows of 128 bytes, eight rows to 1024, with the 16-byte chunk c of row r at c ^ r % 8; rows of 64 bytes, eight to 512, have
it at c ^ r // 2 % 4. PTX only, and only on compute capability 9.0.
Source: PTX ISA, "Asynchronous warpgroup level matrix instructions", "wgmma.mma_async.sp", and "Shared memory matrix layout".
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _wgmma_asm(dtype, groups, tokens, columns):
    """`groups` times `columns` / 32 products of 64 rows, 32 columns and `tokens` tokens."""
    kind = "bf16" if dtype == tl.bfloat16 else "f16"
    sums = tokens // 2
    weights, x, weights_form, x_form, metadata = (f"${groups * sums * 2 + k}" for k in range(5))
    first_metadata = int(metadata[1:])
    lines = [".reg .pred yes;", ".reg .b32 at;", ".reg .b64 a, b;", "setp.eq.b32 yes, 0, 0;", "wgmma.fence.sync.aligned;"]
    for group in range(groups):
        into = ", ".join(f"${group * sums + k}" for k in range(sums))
        for part in range(columns // 32):
            # In units of 16 bytes: 32 columns are 32 bytes of values and 64 of x, whose next 64 columns follow `tokens` rows later.
            lines += [
                f"add.u32 at, {weights}, {group * columns * 4 + part * 2};",
                f"mov.b64 a, {{at, {weights_form}}};",
                f"add.u32 at, {x}, {part // 2 * tokens * 8 + part % 2 * 4};",
                f"mov.b64 b, {{at, {x_form}}};",
                f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{kind}.{kind} {{{into}}}, a, b, "
                f"${first_metadata + group * (columns // 64) + part // 2}, {part % 2}, yes, 1, 1, 0, 0;",
            ]
    return "{\n" + "\n".join([*lines, "wgmma.commit_group.sync.aligned;"]) + "\n}"


@triton.constexpr_function
def _constraints(groups, tokens, others):
    sums = groups * tokens // 2
    return ",".join(["=f"] * sums + [str(k) for k in range(sums)] + ["r"] * others)


@triton.constexpr_function
def _types(groups, tokens):
    return (tl.float32,) * (groups * tokens // 2)


@triton.jit
def start_24(
    sums, weights_at, x_at, metadata, DTYPE: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Starts sums += weights @ x of GROUPS x 64 rows, COLUMNS (64 or 128) columns, TOKENS tokens; whole warpgroups.

    weights_at: shared memory of GROUPS x 64 rows of COLUMNS / 2 kept values. x_at: of TOKENS rows of 64 columns, and after them those of
    the next 64. Both at multiples of 1024 bytes. metadata: for each group a word for every 64 columns, as for `mma_24`.
    """
    # Descriptors: addresses in units of 16 bytes; how far from eight rows to the next; the form of the rows (1: 128 bytes, 2: 64 bytes).
    none = weights_at * 0
    wide = none + (64 | (1 << 30))
    form = wide if COLUMNS == 128 else none + (32 - (1 << 31))
    operands = sums + ((weights_at >> 4) | (1 << 16), (x_at >> 4) | (1 << 16), form, wide) + metadata
    return tl.inline_asm_elementwise(
        _wgmma_asm(DTYPE, GROUPS, TOKENS, COLUMNS), _constraints(GROUPS, TOKENS, 4 + GROUPS * (COLUMNS // 64)), operands,
        dtype=_types(GROUPS, TOKENS), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def finish_24(sums, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """The sums of all that was started, once they are there: between the two nothing may touch them."""
    return tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0;", _constraints(GROUPS, TOKENS, 0), sums, dtype=_types(GROUPS, TOKENS), is_pure=False, pack=1
    )


@triton.jit
def publish_copies():
    """Makes this thread's copies that have arrived visible to the `start_24` of those that meet it afterwards."""
    tl.inline_asm_elementwise("fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def meet_cluster():
    """A barrier of all programs of the cluster; what they wrote to shared memory before it is visible to all."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;",
        "=r", [], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put_float(to, a):
    """fp32 to shared memory."""
    tl.inline_asm_elementwise("st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [to, a], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def get_four_of(source, rank: tl.constexpr):
    """Four fp32 from the shared memory of the program `rank` of the cluster, at the place that is `source` in this program's."""
    return tl.inline_asm_elementwise(
        """{
            .reg .b32 there;
            mapa.shared::cluster.u32 there, $4, $5;
            ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [there];
        }""",
        "=f,=f,=f,=f,r,r", [source, source * 0 + rank], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip
