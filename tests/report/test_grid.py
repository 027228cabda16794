"""Names as blocks x projections, for the names that models really have."""

from __future__ import annotations

import pytest
from run_folders import NAMES

from proxsparse_triton.report.grid import grid


def laid_out(names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = grid(dict.fromkeys(names, 0.5))
    assert sum(len(cell.layers) for cell in found.cells.values()) == len(names)
    return found.rows, found.columns


def test_blocks_are_rows_projections_are_columns_in_model_order() -> None:
    found = grid({name: float(index) for index, name in enumerate(NAMES)})
    assert found.rows == ("0", "1", "2")
    assert found.columns == ("q_proj", "o_proj", "up_proj")
    assert [[found.cells[row, column].value for column in range(3)] for row in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert found.cells[2, 1].layers == ("model.layers.2.self_attn.o_proj.weight",)


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        (["transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"], ("0", "1"), ("c_attn",)),
        ([f"model.layers.{i}.q.weight" for i in (10, 2, 9)], ("2", "9", "10"), ("q",)),  # by number, not by text
        (["model.layers.7.q.weight", "model.layers.7.k.weight"], ("7",), ("q", "k")),  # no number varies: the first
        (["stage.0.block.0.q.weight", "stage.0.block.1.q.weight"], ("0", "1"), ("q",)),  # the first that varies
        (["h.0.attn.out.weight", "h.0.cross.out.weight", "h.1.attn.out.weight"], ("0", "1"), ("attn.out", "cross.out")),
        (["0.weight", "2.weight"], ("0", "2"), ("weight",)),
        (["encoder.block.0.q.weight", "encoder.block.1.q.weight", "decoder.block.0.q.weight"], ("encoder.block.0", "encoder.block.1",
                                                                                         "decoder.block.0"), ("q",)),
        (["model.layers.0.q.weight", "model.layers.1.q.weight", "lm_head.weight"], ("0", "1", "-"), ("q", "lm_head")),
        (["proj", "head.weight"], ("-",), ("proj", "head")),
    ],
)  # fmt: skip
def test_names(names: list[str], rows: tuple[str, ...], columns: tuple[str, ...]) -> None:
    assert laid_out(names) == (rows, columns)


def test_experts_share_a_cell() -> None:
    values = {f"m.{block}.experts.{expert}.up.weight": float(expert) for block in range(2) for expert in range(4)}
    found = grid({**values, "m.0.up.weight": 9.0})
    assert found.columns == ("experts.*.up", "up")
    assert found.cells[1, 0].value == 1.5
    assert found.cells[1, 0].layers == tuple(f"m.1.experts.{expert}.up.weight" for expert in range(4))
    assert (1, 1) not in found.cells


def test_nothing() -> None:
    assert grid({}).cells == {}
