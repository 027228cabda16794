"""`pst bench masked`: what is measured, that nothing wrong is timed, and what the rows say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse_triton.benchmarks import masked
from proxsparse_triton.benchmarks.masked import SCATTER, SUM, MaskedBench, bytes_per_weight
from proxsparse_triton.benchmarks.timer import machine
from proxsparse_triton.errors import BackendError, ConfigError
from proxsparse_triton.reference.masked import masked_weight_24

QUICK = machine("cpu", quick=True)
SMALL = ((32, 64),)


def test_rows() -> None:
    rows = list(MaskedBench(shapes=SMALL).run(QUICK))
    ways = ["masked_weight_24 (reference)", SUM, SCATTER]
    assert [(row["dtype"], row["what"]) for row in rows] == [(dtype, way) for dtype in ("bfloat16", "float32") for way in ways]
    for row in rows:
        traffic = {"bfloat16": 6, "float32": 10}[str(row["dtype"])] * 32 * 64
        assert (row["bench"], row["shape"], row["scratch_bytes"]) == ("masked", "32x64", None)
        assert row["gb_per_s"] == pytest.approx(traffic / row["us"] / 1e3)  # type: ignore[operator]
        ours = next(other for other in rows if other["dtype"] == row["dtype"])
        assert row["times_ours"] == row["us"] / ours["us"]  # type: ignore[operator]
    assert [row["what"] for row in MaskedBench(("bfloat16",), SMALL, rival=False).run(QUICK)] == ways[:2]


def test_the_default_on_a_cpu_is_small() -> None:
    assert {row["shape"] for row in MaskedBench(("float32",), rival=False).run(QUICK)} == {"512x1024"}


def test_bytes_per_weight() -> None:
    assert (bytes_per_weight(torch.bfloat16), bytes_per_weight(torch.float32)) == (6, 10)


def test_torch_in_a_line_is_the_reference() -> None:
    w, w0 = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.5, 2, 128)
    assert torch.equal(masked._scattered(w, w0, scale), masked_weight_24(w, w0, column_scale=scale))


@pytest.mark.parametrize("broken", ["masked_weight_24", "_scattered"])
def test_nothing_wrong_is_timed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(w: Tensor, w0: Tensor, scale: Any = None, *, column_scale: Any = None, out: Tensor | None = None) -> Tensor:
        return w0.to(w.dtype) if out is None else out.copy_(w0)

    monkeypatch.setattr(masked, broken, wrong)
    monkeypatch.setattr(masked, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(BackendError, match="to give the reference's answer, got another"):
        list(MaskedBench(shapes=SMALL).run(QUICK))


def test_bad_shapes() -> None:
    with pytest.raises(ConfigError, match=r"bench masked: expected --shape OUTxIN with IN divisible by 4, got 8x6. Choose another."):
        MaskedBench(shapes=((8, 6),))


@pytest.mark.gpu
def test_on_the_card() -> None:
    rows = list(MaskedBench(("bfloat16",), ((1024, 1024),)).run(machine("cuda", quick=True)))
    assert [row["what"] for row in rows] == ["masked_weight_24 (triton)", SUM, SCATTER, masked.COMPILED]
    assert rows[0]["scratch_bytes"] == 0
    assert rows[2]["scratch_bytes"] > 2 * 1024 * 1024  # type: ignore[operator]
