"""Runs as charts: which figures become which lines, bars and cells, and the reason where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_folders import DENSE, NAMES, manifest, rows, write_comparison, write_run

from proxsparse_triton.report import figures
from proxsparse_triton.report.charts import Bars, Curves, HeatMap
from proxsparse_triton.report.reading import Run, read_runs


def run_with(tmp_path: Path, steps: list[dict[str, Any]], **changes: Any) -> Run:
    return read_runs([write_run(tmp_path / "run", manifest(**changes), steps)])[0]


def curves(run: Run) -> Curves:
    chart = figures.curves(run, "curves")
    assert isinstance(chart, Curves)
    return chart


def test_panels_over_steps(tmp_path: Path) -> None:
    chart = curves(run_with(tmp_path, rows()))
    assert [panel.label for panel in chart.panels] == ["loss", "blocks that are 2:4", "learning rate"]
    loss, share, lr = (panel.lines[0] for panel in chart.panels)
    assert loss.points == ((1, 2.75), (2, 2.5), (3, 2.25), (4, 2.0))
    assert loss.label == "2.000"
    assert share.label == "96.0 %"
    assert (chart.panels[1].low, chart.panels[1].high) == (0, 1)
    assert (lr.style, lr.points[-1]) == ("thin", (4, 1e-3))
    assert chart.description == "Loss from 2.750 to 2.000; share of 2:4 blocks from 24.0 % to 96.0 %; 4 steps."


def test_a_long_run_has_a_running_mean_over_its_steps(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 2.0 + (-1) ** step} for step in range(1, 101)]
    (panel,) = curves(run_with(tmp_path, steps)).panels
    faint, mean = panel.lines
    assert (faint.style, len(faint.points)) == ("faint", 100)
    assert mean.label == "2.200, mean of 5 steps"  # of the last five: 3, 1, 3, 1, 3
    assert mean.points[-1] == pytest.approx((98, 2.2))
    assert max(abs(value - 2) for _, value in mean.points[2:]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ({"name": "proxsparse", "loss": "kl", "settings": {"loss": None}}, "loss: divergence from the dense model"),
        ({"name": "proxsparse", "settings": {"loss": "ce"}}, "loss: cross-entropy, nats per token"),
        ({"name": "proxsparse", "settings": {"loss": "new"}}, "loss, new"),
    ],
)
def test_the_loss_is_named(tmp_path: Path, method: dict[str, Any], label: str) -> None:
    assert curves(run_with(tmp_path, rows(), method=method)).panels[0].label == label


def test_mask_changes_over_steps_and_layers(tmp_path: Path) -> None:
    steps = rows()
    for row, share in ((steps[1], 0.5), (steps[3], 0.25)):
        row["mask_changes"] = {NAMES[0]: share, NAMES[4]: 0.0}
    run = run_with(tmp_path, steps)
    panel = curves(run).panels[2]
    assert panel.label == "blocks whose mask changed since the last look"
    assert panel.lines[0].points == ((2, 0.25), (4, 0.125))
    chart = figures.changes(run, "changes")
    assert isinstance(chart, HeatMap)
    assert chart.grid.columns == ("q_proj", "o_proj")
    assert [chart.grid.cells[place].value for place in ((0, 0), (1, 1))] == [0.75, 0.0]
    assert chart.legend == "changes a block, of at most 2"
    assert f"Most in {NAMES[0]}: 0.75" in chart.description


def test_commitment_is_that_of_the_last_row_in_the_models_order(tmp_path: Path) -> None:
    steps = rows()
    steps[-1]["layers"] = dict(reversed(steps[-1]["layers"].items()))
    chart = figures.commitment(run_with(tmp_path, steps), "commitment")
    assert isinstance(chart, HeatMap)
    assert chart.grid.rows == ("0", "1", "2")
    assert chart.grid.columns == ("q_proj", "o_proj", "up_proj")
    assert chart.grid.cells[2, 1].value == pytest.approx(0.93)
    assert chart.description == f"Least 92.0 % in {NAMES[8]}, most 100.0 % in {NAMES[0]}, mean of the layers 96.0 %."


def test_reasons(tmp_path: Path) -> None:
    run = run_with(tmp_path, [])
    for chart, word in ((figures.curves, "no steps"), (figures.commitment, "layers' shares"), (figures.changes, "no row of metrics.jsonl")):
        reason = chart(run, "n")
        assert isinstance(reason, str)
        assert word in reason
    assert "needs two runs" in str(figures.perplexities([run], "n"))
    assert "different --samples" in str(figures.over_windows([run, run], "n"))


def test_bars_with_the_dense_model_as_a_line(tmp_path: Path) -> None:
    runs = read_runs([write_comparison(tmp_path / "all", {"magnitude": 20.0, "wanda": 15.0, "proxsparse": 12.0})])
    chart = figures.perplexities(runs, "perplexity")
    assert isinstance(chart, Bars)
    assert [(bar.label, bar.value, bar.text, bar.color) for bar in chart.bars] == [
        ("magnitude", 20.0, "20.000", 0),
        ("wanda", 15.0, "15.000", 1),
        ("proxsparse", 12.0, "12.000", 2),
    ]
    assert chart.level == ("dense", DENSE)
    assert not chart.log
    assert "Lowest: proxsparse with 12.000; dense 10.500. Measured on 8 windows of 128 tokens of stdlib (heldout)." in chart.description


def test_a_method_that_fails_makes_the_axis_logarithmic(tmp_path: Path) -> None:
    chart = figures.perplexities(read_runs([write_comparison(tmp_path / "all", {"magnitude": 2000.0, "wanda": 15.0})]), "n")
    assert isinstance(chart, Bars)
    assert chart.log


def test_only_runs_measured_alike_are_compared(tmp_path: Path) -> None:
    other_text = {"windows": 8, "seqlen": 64, "source": "other", "fingerprint": "f"}
    contents = [
        manifest(),
        manifest("wanda"),
        manifest(evaluation=other_text),
        manifest(model={"spec": "demo", "files": {"model.safetensors": "cd"}}),
        manifest(model={"spec": "elsewhere/demo", "files": {"model.safetensors": "ab"}}),  # the same model by another name
        manifest(config={"dtype": "bfloat16", "samples": 16}),
        manifest(pruned=None),
    ]
    runs = read_runs([write_run(tmp_path / str(index), content) for index, content in enumerate(contents)])
    assert [[run.folder.name for run in group] for group in figures.measured_alike(runs)] == [["0", "1", "4"], ["2"], ["3"], ["5"]]


def windows(tmp_path: Path, contents: list[dict[str, Any]]) -> Curves:
    chart = figures.over_windows(
        read_runs([write_run(tmp_path / str(index), content) for index, content in enumerate(contents)]), "windows"
    )
    assert isinstance(chart, Curves)
    return chart


def test_perplexity_over_windows(tmp_path: Path) -> None:
    points = [("proxsparse", 64, 12.0), ("proxsparse", 16, 14.0), ("wanda", 16, 15.0), ("proxsparse", 16, 16.0), ("wanda", 64, 15.5)]
    chart = windows(tmp_path, [manifest(method, value, samples) for method, samples, value in (*points, ("sparsegpt", 16, 13.0))])
    dots, line, _, other = chart.panels[0].lines
    assert (dots.style, dots.points) == ("dots", ((16, 14), (16, 16), (64, 12)))
    assert (line.label, line.points) == ("proxsparse", ((16, 15), (64, 12)))  # through the means
    assert (other.label, other.points) == ("wanda", ((16, 15), (64, 15.5)))
    assert (line.color, other.color) == (0, 1)
    assert chart.ticks == (16, 64)
    assert not chart.log
    assert chart.panels[0].level == ("dense", DENSE)


def test_other_settings_are_another_line(tmp_path: Path) -> None:
    def method(**settings: object) -> dict[str, Any]:
        return {"name": "proxsparse", "settings": {"lambda1": None, **settings}}

    methods = [method(), method(), method(lambda2=0.5), method(lambda2=0.5)]
    contents = [manifest("proxsparse", 15.0 - index, (8, 64)[index % 2], method=methods[index]) for index in range(4)]
    chart = windows(tmp_path, contents)
    assert [line.label for line in chart.panels[0].lines if line.label] == ["proxsparse, lambda2 default", "proxsparse, lambda2 0.5"]
    assert len({line.color for line in chart.panels[0].lines}) == 2
    assert chart.log


def test_a_method_without_text_has_no_line_over_windows(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / str(samples), manifest("magnitude", 20.0, samples)) for samples in (16, 64)])
    assert isinstance(figures.over_windows(runs, "n"), str)
