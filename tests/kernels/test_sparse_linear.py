"""The sparse tensor cores' product in plain Triton, the launches of the kernel for few tokens, and what the compiler makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from proxsparse_triton.kernels.launch import BY_BALANCE, BY_ROWS, Decode, decode  # noqa: E402

LAUNCHES = [*(one for choices in BY_ROWS.values() for _, one in choices), *(one for choices in BY_BALANCE.values() for one in choices)]
H200, A100, RTX_4090 = (132, 232448), (108, 166912), (128, 101376)  # multiprocessors, bytes of shared memory a program


@pytest.mark.parametrize("card", [H200, A100, RTX_4090], ids=["H200", "A100", "RTX 4090"])
@pytest.mark.parametrize("rows", [16, 512, 1024, 4096, 5120, 11008, 14336, 28672, 152064])
def test_every_count_has_a_launch_that_fits(rows: int, card: tuple[int, int]) -> None:
    for tokens in range(1, 600):
        chosen = decode(tokens, rows, *card)
        assert chosen.bytes <= card[1]
        assert chosen.tokens >= min(tokens, 8 * chosen.token_tiles)
        assert chosen.tokens <= 8 * chosen.token_tiles
        assert chosen.stages >= 2
        assert 1 <= chosen.column_warps <= 15
        assert chosen.row_warps >= 1


def test_the_measured_launches_are_chosen_on_the_card_they_were_measured_on() -> None:
    best = {
        (1, 11008): (2, 4, 1, 2, 2, 1, 2),
        (1, 4096): (1, 4, 1, 2, 4, 1, 2),
        (16, 28672): (4, 2, 2, 1, 3, 2, 16),
        (64, 11008): (6, 2, 2, 1, 4, 4, 32),
        (64, 4096): (2, 4, 2, 1, 3, 4, 32),
        (64, 14336): (2, 2, 4, 1, 3, 8, 64),
        (64, 22016): (3, 2, 4, 1, 3, 8, 64),
        (64, 28672): (4, 2, 4, 1, 3, 8, 64),
        (96, 12288): (3, 2, 4, 1, 3, 6, 48),
        (256, 11008): (3, 1, 4, 1, 3, 8, 64),
    }
    for (tokens, rows), expected in best.items():
        assert astuple(decode(tokens, rows, *H200)) == expected, (tokens, rows)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the plain product is for the interpreter")
def test_the_plain_product_is_that_of_the_tensor_cores() -> None:
    """By the layout of PTX's fragments, written out as loops; on a card `tests/ops` holds the instruction itself to the same product."""
    generator = torch.Generator().manual_seed(0)
    w = torch.zeros(16, 64)
    words = torch.zeros(16, 4, dtype=torch.int64)
    values = torch.randn(16, 32, generator=generator).bfloat16()
    for row in range(16):
        for block in range(16):
            i0, i1 = sorted(torch.randperm(4, generator=generator)[:2].tolist())
            w[row, 4 * block + i0], w[row, 4 * block + i1] = values[row, 2 * block].float(), values[row, 2 * block + 1].float()
            words[row, block // 4] |= (i0 | i1 << 2) << (4 * (block % 4))
    x = torch.randn(8, 64, generator=generator).bfloat16()
    bits, x_bits = values.view(torch.int16).int() & 0xFFFF, x.view(torch.int16).int() & 0xFFFF
    pair = lambda matrix, row, column: int(matrix[row, column]) | int(matrix[row, column + 1]) << 16  # noqa: E731
    columns: list[list[int]] = [[] for _ in range(17)]
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for half in range(2):
            for k, (row, column) in enumerate(((g, 0), (g + 8, 0), (g, 8), (g + 8, 8))):
                columns[8 * half + k].append(pair(bits, row, 16 * half + column + 2 * t))
            for k in range(4):
                columns[8 * half + 4 + k].append(pair(x_bits, g, 32 * half + 8 * k + 2 * t))
        columns[16].append(int(words[g, t]) | int(words[g + 8, t]) << 16)
    inputs = torch.tensor(columns, dtype=torch.int64).to(torch.int32)
    sums = torch.zeros(4, 32)
    _product_kernel()[(1,)](inputs, sums)
    exact = w.double() @ x.double().T
    for lane in range(32):
        g, t = lane // 4, lane % 4
        found = sums[:, lane].double()
        expected = torch.stack([exact[g, 2 * t], exact[g, 2 * t + 1], exact[g + 8, 2 * t], exact[g + 8, 2 * t + 1]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _product_kernel() -> Any:
    import triton.language as tl

    from proxsparse_triton.kernels.fragments import mma_24

    @triton.jit
    def kernel(inputs, sums):  # type: ignore[no-untyped-def]
        lane = tl.arange(0, 32)
        c = (tl.zeros([32], tl.float32), tl.zeros([32], tl.float32), tl.zeros([32], tl.float32), tl.zeros([32], tl.float32))
        e = tl.load(inputs + 16 * 32 + lane)
        for half in tl.static_range(2):
            at = inputs + half * 256 + lane
            c = mma_24(
                tl.load(at), tl.load(at + 32), tl.load(at + 64), tl.load(at + 96), tl.load(at + 128), tl.load(at + 160),
                tl.load(at + 192), tl.load(at + 224), c[0], c[1], c[2], c[3], e, tl.bfloat16, half,
            )  # fmt: skip
        for k in tl.static_range(4):
            tl.store(sums + k * 32 + lane, c[k])

    kernel.fn.__globals__.update(tl=tl, mma_24=mma_24)
    return kernel


# A process of its own: under TRITON_INTERPRET=1 the kernels are numpy and cannot be compiled.
SCRIPT = textwrap.dedent(
    """
    import json, re, sys

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from proxsparse_triton.kernels import launch, sparse_linear
    from proxsparse_triton.kernels.staging import RESERVE_STEP
    from tests.resources import usage

    kernel = sparse_linear._sparse_linear_kernel
    names = kernel.arg_names
    for arch, dtype, order, numbers in json.loads(sys.argv[1]):
        chosen = launch.Decode(*numbers)
        types = {name: "*" + dtype for name in ("x_ptr", "values_ptr", "bias_ptr", "y_ptr")}
        types |= {"metadata_ptr": "*i16", "tokens": "i32", "rows": "i32", "width": "i32"}
        settings = sparse_linear._settings(chosen, order, True)
        signature = {name: types.get(name, "constexpr") for name in names}
        multiples = [name for name in types if name != "tokens"]
        least = -(-chosen.bytes // RESERVE_STEP.value)
        for reserved in range(least, least + 3):
            constants = settings | {"RESERVED": reserved}
            source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()},
                               {(names.index(name),): [["tt.divisibility", 16]] for name in multiples})
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": chosen.warps})
            if made.metadata.shared >= chosen.bytes:
                break
        ptx = made.asm["ptx"]
        print(json.dumps({"shared": made.metadata.shared, "usage": usage(made.asm["cubin"]),
                          "products": ptx.count("mma.sp::ordered_metadata"),
                          "narrow": len(re.findall(r"ld.global(?!.nc.L1)", ptx))}), flush=True)
    """
)


def cases() -> list[tuple[int, str, str, Decode]]:
    """Every launch for the card it was measured on; on others and in other orders one for few tokens and one for many."""
    few, many = BY_ROWS[2][1][1], BY_ROWS[16][1][1]
    others = [(80, "fp16", "ampere", few), (80, "bf16", "ampere", many), (90, "fp16", "linear", many), (100, "bf16", "hopper", few)]
    return [*((90, "bf16", "hopper", one) for one in dict.fromkeys(LAUNCHES)), *others, (100, "bf16", "hopper", many)]


@pytest.mark.slow
def test_compiled() -> None:
    """No spilled register, enough shared memory, and each product there as often as a turn needs it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    listed = [(arch, dtype, order, astuple(one)) for arch, dtype, order, one in cases()]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(listed)], capture_output=True, text=True, check=False, env=environment, cwd=root
    )
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(reports) == len(listed)
    for (arch, _, order, one), report in zip(cases(), reports, strict=True):
        assert (report["usage"]["STACK"], report["usage"]["LOCAL"]) == (0, 0), (one, report)
        assert report["usage"]["REG"] * 32 * one.column_warps * one.row_warps <= 65536, (one, report)
        assert report["shared"] >= one.bytes, (arch, order, one, report)
        assert report["products"] == 2 * one.tiles * one.token_tiles * one.segments, (one, report)
