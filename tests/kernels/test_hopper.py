"""The launches of the kernel for Hopper, and what the compiler makes of them; `tests/ops` holds it to the exact product on a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import astuple
from pathlib import Path

import pytest

pytest.importorskip("triton")

from proxsparse_triton.kernels.hopper_launch import Warpgroups, granted, hopper, launches, microseconds

H200, H100_PCIE = 132, 114  # multiprocessors
SHARED = 232448  # bytes that a program may use


@pytest.mark.parametrize("width", [64, 192, 448, 4096, 4160, 11008])
@pytest.mark.parametrize("rows", [64, 1024, 4096, 4160, 11008, 28672, 152064])
def test_every_count_has_a_launch_that_fits(rows: int, width: int) -> None:
    for tokens in [*range(1, 130), *range(130, 1100, 37), 4096, 16384]:
        for multiprocessors in (H200, H100_PCIE):
            launch = hopper(tokens, rows, width, multiprocessors)
            assert launch.bytes <= granted(launch) <= SHARED
            assert launch.stage % 1024 == 0
            assert width % launch.columns == 0
            assert launch.groups % launch.warpgroups == 0
            assert launch.tokens % 8 == 0
            assert launch.tokens >= min(tokens, 96)  # few tokens are one program's
            assert launch.stages >= 3
            assert launch.splits == 1 or width // launch.columns // launch.splits >= 3


def test_the_measured_launches_are_chosen_on_the_card_they_were_measured_on() -> None:
    best = {
        (16, 11008, 4096): (1, 1, 16, 128, 4, 2),
        (64, 4096, 4096): (1, 1, 64, 128, 8, 2),
        (128, 11008, 4096): (2, 2, 128, 128, 4, 1),
        (128, 28672, 8192): (4, 4, 128, 128, 3, 1),
        (192, 4096, 11008): (2, 2, 96, 128, 5, 2),
        (256, 12288, 4096): (6, 2, 128, 64, 5, 2),
        (384, 4096, 4096): (2, 2, 192, 128, 3, 2),
        (512, 11008, 4096): (4, 2, 176, 64, 5, 1),
    }
    for (tokens, rows, width), expected in best.items():
        assert astuple(hopper(tokens, rows, width, H200)) == expected, (tokens, rows, width)


def test_the_model_is_near_what_was_measured() -> None:
    """Medians of graphs on an H200 in bf16; more columns take longer, and fewer multiprocessors no less."""
    for launch, tokens, rows, width, measured in (
        (Warpgroups(1, 1, 64, 128, 8, 2), 64, 4096, 4096, 9.15),
        (Warpgroups(2, 2, 128, 128, 4, 1), 128, 11008, 4096, 22.6),
        (Warpgroups(4, 2, 176, 64, 5, 1), 512, 11008, 4096, 48.7),
        (Warpgroups(4, 4, 128, 128, 3, 1), 128, 28672, 8192, 77.4),
    ):
        modelled = microseconds(launch, tokens, rows, width, H200)
        assert modelled == pytest.approx(measured, rel=0.08)
        assert microseconds(launch, tokens, rows, 2 * width, H200) > modelled
        assert microseconds(launch, tokens, rows, width, H100_PCIE) >= modelled


# A process of its own: under TRITON_INTERPRET=1 the kernels are numpy and cannot be compiled.
SCRIPT = textwrap.dedent(
    """
    import json, sys

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from proxsparse_triton.kernels import hopper, hopper_launch
    from proxsparse_triton.kernels.staging import RESERVE_STEP
    from tests.resources import usage

    kernel = hopper._hopper_kernel
    names = kernel.arg_names
    for dtype, numbers in json.loads(sys.argv[1]):
        launch = hopper_launch.Warpgroups(*numbers)
        types = {name: "*" + dtype for name in ("x_ptr", "values_ptr", "bias_ptr", "y_ptr")}
        types |= {"metadata_ptr": "*i16", "tokens": "i32", "rows": "i32", "width": "i32"}
        constants = hopper.settings(launch, True) | {"RESERVED": -(-launch.bytes // RESERVE_STEP.value)}
        source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names},
                           {(names.index(name),): value for name, value in constants.items()},
                           {(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "tokens"})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.warps})
        ptx = made.asm["ptx"]
        print(json.dumps({"shared": made.metadata.shared, "usage": usage(made.asm["cubin"]), "products": ptx.count("wgmma.mma_async.sp."),
                          "far": ptx.count("ld.shared::cluster")}), flush=True)
    """
)


def cases() -> list[tuple[str, Warpgroups]]:
    """Every form of a program once, the largest of those that differ in tokens only, with the splits that come up."""
    largest: dict[tuple[int, int, int], Warpgroups] = {}
    for tokens in (8, 128, 512):
        for launch in launches(tokens, 4096):
            form = (launch.groups, launch.warpgroups, launch.columns)
            if launch.splits <= 2 and (form not in largest or largest[form].bytes <= launch.bytes):
                largest[form] = launch
    return [("bf16", one) for one in largest.values()] + [("fp16", hopper(16, 1024, 4096, H200))]


@pytest.mark.slow
def test_compiled() -> None:
    """No spilled register, enough shared memory, each product and each far sum there as often as a turn and the end need it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    listed = [(dtype, astuple(one)) for dtype, one in cases()]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(listed)],
        capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(reports) == len(listed)
    for (_, one), report in zip(cases(), reports, strict=True):
        assert (report["usage"]["STACK"], report["usage"]["LOCAL"]) == (0, 0), (one, report)
        assert report["usage"]["REG"] * 32 * one.warps <= 65536, (one, report)
        assert one.bytes <= report["shared"] <= SHARED, (one, report)
        assert report["products"] == one.groups // one.warpgroups * one.columns // 32, (one, report)
        steps = -(-one.tokens * one.groups * 16 // (one.warps * 32 * one.splits))
        assert report["far"] == (one.splits * min(steps, 16 // one.splits, 8) if one.splits > 1 else 0), (one, report)
