"""Compiles every kernel for cards that need not be here: no spilled register, no barrier between threads, whole-block accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# A process of its own: under TRITON_INTERPRET=1 the kernels are numpy and cannot be compiled.
SCRIPT = textwrap.dedent(
    """
    import collections, json, pathlib, re, subprocess, sys, tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from proxsparse_triton.kernels import frozen_penalty, launch, mask, masked, pack, partial, prox, prox_adamw, ptx, sweeps

    for_amd = sys.argv[2] == "hip"
    if for_amd:
        for module in (ptx, prox, sweeps):
            module.PTX = triton.language.constexpr(False)

    cases = []  # name, kernel, types, constants, warps, sizes that are multiples of 16
    for dtype in ("fp32", "bf16", "fp16"):
        for scaled, whole in ((False, False), (False, True), (True, False), (True, True)):
            types = {"z_ptr": "*" + dtype, "scale_ptr": "*fp32" if scaled else "*" + dtype, "out_ptr": "*" + dtype,
                     "lam": "fp32", "rate": "fp32", "n_blocks": "i32", "row_blocks": "i32", "first_tile": "i32"}
            constants = {"HAS_SCALE": scaled, "WHOLE": whole, "TILE_BLOCKS": launch.PROX.tile_blocks, "TILES": launch.PROX.tiles}
            name = f"prox {dtype}" + " scaled" * scaled + " whole" * whole
            cases.append((name, prox._prox_24_kernel, types, constants, launch.PROX.num_warps, ()))
        types = {"score_ptr": "*" + dtype, "mask_ptr": "*i1", "n_blocks": "i32"}
        constants = {"TILE_BLOCKS": launch.BLOCKWISE.tile_blocks}
        cases.append((f"mask {dtype}", mask._mask_24_kernel, types, constants, launch.BLOCKWISE.num_warps, ()))
    for w, w0 in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16")):
        for scaled in (False, True):
            types = {"w_ptr": "*" + w, "w0_ptr": "*" + w0, "scale_ptr": "*fp32" if scaled else "*" + w, "out_ptr": "*" + w,
                     "n_blocks": "i32", "row_blocks": "i32"}
            constants = {"HAS_SCALE": scaled, "TILE_BLOCKS": launch.BLOCKWISE.tile_blocks}
            name = f"masked {w} {w0}" + " scaled" * scaled
            cases.append((name, masked._masked_weight_24_kernel, types, constants, launch.BLOCKWISE.num_warps, ()))
    for bits in ("i16", "i32"):
        types = {"w_ptr": "*" + bits, "values_ptr": "*" + bits, "metadata_ptr": "*u8", "wrong_ptr": "*i32",
                 "row_blocks": "i32", "n_pairs": "i32"}
        for whole in (True, False):
            constants = {"WHOLE": whole, "PAIRS": launch.BLOCKWISE.tile_blocks // 2}
            end = "" if whole else " ragged"
            for masked in (False, True):
                more = {"mask_ptr": "*i1" if masked else "*" + bits}, {"HAS_MASK": masked}
                name = f"pack {bits}" + " masked" * masked + end
                cases.append((name, pack._pack_24_kernel, types | more[0], constants | more[1], launch.BLOCKWISE.num_warps, ()))
            cases.append((f"unpack {bits}" + end, pack._unpack_24_kernel, types, constants, launch.BLOCKWISE.num_warps, ()))
    scalars = ("step_size", "decay", "eps", "beta1_rest", "beta2", "beta2_rest", "root_correction", "lambda1", "lambda2", "frozen_eps")
    for w, moments, bits in (("fp32", "fp32", 0), ("bf16", "fp32", 0), ("bf16", "bf16", 0), ("bf16", "bf16", 8), ("bf16", "bf16", 16),
                             ("bf16", "i8", 0), ("bf16", "i8", 8)):
        for full in (True, False):
            types = {name: "fp32" for name in scalars} | {name: "*fp32" for name in ("m_scale_ptr", "v_scale_ptr", "scale_ptr")}
            types |= {name: "*" + w for name in ("w_ptr", "grad_ptr", "w0_ptr")}
            types |= {"m_ptr": "*" + moments, "v_ptr": "*u8" if moments == "i8" else "*" + moments,
                      "coef_ptr": "*fp32", "partial_ptr": "*fp32",
                      "residual_ptr": {0: "*" + w, 8: "*i8", 16: "*i16"}[bits],
                      "key": "i32", "counter_high": "i32", "first_block": "i32", "n_blocks": "i32", "row_blocks": "i32"}
            constants = {"HAS_W0": full, "HAS_SCALE": full, "HAS_COEF": full, "HAS_PROX": True, "CLIP_TOTAL": True, "RESIDUAL_BITS": bits,
                         "EIGHT_BIT": moments == "i8", "STOCHASTIC": w == "bf16", "EVEN": not full,
                         "TILE_BLOCKS": launch.FUSED.tile_blocks, "TILES": launch.FUSED.tiles}
            name = f"prox_adamw {w} {moments} {bits}" + " full" * full
            cases.append((name, prox_adamw._prox_adamw_kernel, types, constants, launch.FUSED.num_warps, ()))
    for w, w0, grad in (("fp32",) * 3, ("fp32", "bf16", "fp32"), ("bf16",) * 3, ("fp16",) * 3):
        types = {"w_ptr": "*" + w, "w0_ptr": "*" + w0, "grad_ptr": "*" + grad, "partial_ptr": "*fp32",
                 "lam": "fp32", "frozen_eps": "fp32", "n": "i32"}
        for has_grad, accumulate in ((False, False), (True, False), (True, True)):
            constants = {"ACCUMULATE": accumulate, "HAS_GRAD": has_grad, "TILE": frozen_penalty.TILE}
            name = f"frozen_penalty {w} {w0} {has_grad + accumulate}"
            cases.append((name, frozen_penalty._frozen_penalty_kernel, types | {"partial_ptr": "*fp64"}, constants, 4, ("n",)))
        for has_w0 in (False, True):
            constants = {"HAS_W0": has_w0, "ROW": 4 if "fp32" in (w, w0, grad) else 8, "TILE": frozen_penalty.SQUARE_TILE,
                         "TILES": frozen_penalty.SQUARE_TILES}
            name = f"gradient_square {w} {w0} {int(has_w0)}"
            cases.append((name, frozen_penalty._gradient_square_kernel, types, constants, 4, ("n",)))

    def compiled(kernel, types, constants, warps, divisible, target):
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        # What the launcher finds out of real tensors: aligned pointers, and sizes that are multiples of 16.
        aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in divisible]
        source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()},
                           {(i,): [["tt.divisibility", 16]] for i in aligned})
        return triton.compile(source, target=target, options={"num_warps": warps})

    types = {"x_ptr": "*fp32", "starts_ptr": "*i64", "out_ptr": "*fp64"}
    for width in (1, 4):
        cases.append((f"partial sums {width}", partial._segment_sums_kernel, types, {"WIDTH": width, "ROWS": partial.ROWS}, 4, ()))

    report = []
    for cc in () if for_amd else (80, 90, 100):
        for name, kernel, types, constants, kernel_warps, divisible in cases:
            if cc != 90 and (name.startswith("prox_adamw") and "full" not in name or name.startswith("prox fp16")):
                continue  # nothing but less to hold, and seconds each
            result = compiled(kernel, types, constants, kernel_warps, divisible, GPUTarget("cuda", cc, 32))
            with tempfile.TemporaryDirectory() as folder:
                cubin = pathlib.Path(folder) / "kernel.cubin"
                cubin.write_bytes(result.asm["cubin"])
                usage = subprocess.run([sys.argv[1], "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
            ptx = result.asm["ptx"]
            report.append({
                "name": f"{name} sm_{cc}",
                "usage": {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)},
                "barriers": ptx.count("bar.sync") + ptx.count("barrier.sync"),
                "pushes": ptx.count("vote.sync"),
                "lists": ptx.count(" pending["),
                "accesses": collections.Counter(re.findall(r"\\b(?:ld|st)\\.global[\\w.:]*", ptx)),
            })
    hip = None
    if for_amd and "amd" in triton.backends.backends:
        name, kernel, types, constants, kernel_warps, divisible = next(case for case in cases if case[0] == "prox bf16 scaled whole")
        assembly = compiled(kernel, types, constants, kernel_warps, divisible, GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
        hip = {
            "spills": [int(count) for count in re.findall(r"[sv]gpr_spill_count:\\s*(\\d+)", assembly)],
            "scratch": [int(count) for count in re.findall(r"\\.private_segment_fixed_size:\\s*(\\d+)", assembly)],
            "barriers": assembly.count("s_barrier"),
        }
    print(json.dumps({"cuda": report, "hip": hip}))
    """
)


def compiled(target: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(CUOBJDUMP), target], capture_output=True, text=True, env=environment, check=False
    )
    if run.returncode and ("ImportError" in run.stderr or "ModuleNotFoundError" in run.stderr):
        pytest.skip(f"this Triton has another compile interface: {run.stderr.splitlines()[-1]}")
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])[target]


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    if not CUOBJDUMP.exists():
        pytest.skip(f"needs cuobjdump from triton's wheel at {CUOBJDUMP}")
    kernels: list[dict[str, Any]] = compiled("cuda")
    return kernels


@pytest.mark.slow
def test_every_kernel_was_compiled(report: list[dict[str, Any]]) -> None:
    assert len(report) == 3 * (8 + 3 + 10 + 12 + 7 + 12 + 8 + 2) + 4 + 7


@pytest.mark.slow
def test_no_register_is_spilled(report: list[dict[str, Any]]) -> None:
    for kernel in report:
        assert set(kernel["usage"]) == {"REG", "STACK", "LOCAL"}, kernel
        assert (kernel["usage"]["STACK"], kernel["usage"]["LOCAL"]) == (0, 0), kernel


@pytest.mark.slow
def test_half_of_the_threads_or_more_fit(report: list[dict[str, Any]]) -> None:
    """128 registers are the limit for 512 threads of a multiprocessor's 65,536 registers."""
    for kernel in report:
        assert kernel["usage"]["REG"] <= 128, kernel


@pytest.mark.slow
def test_no_barrier(report: list[dict[str, Any]]) -> None:
    """One thread owns a block and one warp a program, which needs no barrier for its list of blocks. Sums over four warps need one, and
    the values of rows that end inside a word, whose pairs of blocks are not aligned."""
    limits = {"frozen_penalty": 2, "gradient_square": 2, "partial": 4}
    for kernel in report:
        operation, *_ = kernel["name"].split()
        limit = 1 if operation == "pack" and "ragged" in kernel["name"] else limits.get(operation, 0)
        assert kernel["barriers"] <= limit, kernel


@pytest.mark.slow
def test_every_push_onto_the_list_is_there_once(report: list[dict[str, Any]]) -> None:
    """A pair of tiles has two pushes, where it is swept and where it is not. More would mean that a lane holds several blocks, or that the
    compiler duplicates what a whole warp has to reach together."""
    from proxsparse_triton.kernels.launch import PROX

    for kernel in report:
        expected = (2 * PROX.tiles, 1) if kernel["name"].startswith("prox ") and "whole" in kernel["name"] else (0, 0)
        assert (kernel["pushes"], kernel["lists"]) == expected, kernel


@pytest.mark.slow
def test_accesses_are_as_wide_as_a_block(report: list[dict[str, Any]]) -> None:
    """16 bytes for four fp32 weights, 8 for four in 16 bits, 4 for the four bytes of a mask."""
    for kernel in report:
        operation, dtype, *operands = kernel["name"].split()
        block = "v4.b32" if dtype == "fp32" else "v2.b32"
        if operation == "prox":
            # A pair of bf16 blocks is one access; pending blocks are read and written one by one. A column scale is 16 bytes a block.
            wide = {"ld.global.v4.b32"} if "scaled" in operands else set()
            if dtype == "bf16" and "whole" in operands:
                wide = {"ld.global.v4.b32", "st.global.v4.b32"}
            assert set(kernel["accesses"]) == {f"ld.global.{block}", f"st.global.{block}"} | wide, kernel
        elif operation == "mask":
            assert set(kernel["accesses"]) == {f"ld.global.{block}", "st.global.b32"}, kernel
        elif operation == "masked":
            assert_masked(kernel)
        elif operation in ("pack", "unpack"):
            assert_half_wide(kernel)
        elif operation == "prox_adamw":
            assert_wide(kernel)
        elif operation != "partial":
            total = "st.global.b64" if operation == "frozen_penalty" else "st.global.b32"
            assert all(access.endswith((".v4.b32", ".v2.b32")) or access == total for access in kernel["accesses"]), kernel


def assert_masked(kernel: dict[str, Any]) -> None:
    """Two blocks a thread: of learned weights, of pretrained ones, of column scales and of the result, each whole and once."""
    _, w, w0, *options, _ = kernel["name"].split()
    block = {"fp32": "v4.b32", "bf16": "v2.b32", "fp16": "v2.b32"}
    expected = Counter({f"st.global.{block[w]}": 2})
    for dtype in (w, w0, *("fp32" for option in options if option == "scaled")):
        expected += Counter({f"ld.global.{block[dtype]}": 2})
    assert kernel["accesses"] == expected, kernel


def assert_half_wide(kernel: dict[str, Any]) -> None:
    """Packing: two blocks of dense weights, each whole, their kept weights at once (alone in a row that ends inside a word), a byte of
    metadata; 4 bytes of mask a block, and the flag."""
    operation, bits, *options, _ = kernel["name"].split()
    packing, ragged = operation == "pack", "ragged" in options
    block, half = ("v4.b32", "v2.b32") if bits == "i32" else ("v2.b32", "b32")
    dense, kept = ("ld", "st") if packing else ("st", "ld")
    expected = Counter({f"{dense}.global.{block}": 2, f"{kept}.global.b8": 1})
    expected += Counter({f"{kept}.global.{half if ragged else block}": 1 + ragged})
    expected += Counter({"ld.global.b32": 2 * ("masked" in options), "st.global.b32": packing})
    assert kernel["accesses"] == expected, kernel


def assert_wide(kernel: dict[str, Any]) -> None:
    """The fused step: 4 bytes only for four codes or residuals of 8 bits, scales of a group, the coefficient and the statistics."""
    _, _, moments, bits, *options, _ = kernel["name"].split()
    codes, low = moments == "i8", bits == "8"
    narrow = {"ld.global.b32": 4 * codes + low + ("full" in options), "st.global.b32": 4 * codes + low + 4}
    for access, count in kernel["accesses"].items():
        assert access.endswith((".v4.b32", ".v2.b32")) or count == narrow[access], kernel


@pytest.mark.slow
def test_a_multiprocessor_holds_all_the_programs_of_the_prox(report: list[dict[str, Any]]) -> None:
    """32 programs are the most; 64 registers are the limit for so many of one warp each."""
    for kernel in report:
        if kernel["name"].startswith("prox ") and "scaled" not in kernel["name"]:
            assert kernel["usage"]["REG"] <= 64, kernel


@pytest.mark.slow
def test_amd() -> None:
    """Without PTX."""
    hip = compiled("hip")
    if hip is None:
        pytest.skip("this Triton has no AMD backend")
    assert hip["spills"]
    assert not any(hip["spills"] + hip["scratch"])
    assert hip["barriers"] == 0
