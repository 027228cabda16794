"""Runs as charts. A function without the figures it needs returns the reason instead: one line for the page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from .charts import Bar, Bars, Curves, HeatMap, Line, Panel, running_mean, thinned
from .grid import grid
from .reading import Run
from .steps import drawable
from .text import figure, percent, plural

LOSSES = {"ce": "loss: cross-entropy, nats per token", "kl": "loss: divergence from the dense model"}
SMOOTHED_FROM = 20  # steps
MOST_BARS, MOST_LINES = 100, 50  # of a chart
OF_THE_RUN = ("calibration", "seqlen", "windows", "repair", "repair_steps")  # settings that all methods have
LOG_FROM = 10  # a perplexity so many times the dense one would hide all the others


def curves(run: Run, name: str) -> Curves | str:
    """Loss, share of 2:4 blocks and learning rate over steps."""
    steps = run.steps
    if not steps.loss and not steps.share:
        return "loss and share of 2:4 blocks: this run has no steps in metrics.jsonl."
    panels = [_loss(run)] if steps.loss else []
    described = []
    if steps.loss:
        described.append(f"Loss from {steps.loss[0][1]:.3f} to {steps.loss[-1][1]:.3f}")
    if steps.share:
        end = steps.share[-1][1]
        line = Line(percent(end), thinned(steps.share), 2)
        panels.append(Panel("blocks that are 2:4", (line,), low=0.0, high=1.0, percent=True))
        described.append(f"share of 2:4 blocks from {percent(steps.share[0][1])} to {percent(end)}")
    if steps.changed:
        line = Line(percent(steps.changed[-1][1]), thinned(steps.changed), 1)
        panels.append(Panel("blocks whose mask changed since the last look", (line,), height=80, low=0.0, percent=True))
        described.append(f"changed masks at the last look {percent(steps.changed[-1][1])}")
    if steps.lr:
        panels.append(Panel("learning rate", (Line("", thinned(steps.lr), 3, "thin"),), height=48, low=0.0))
    return Curves(name, "Learning", "; ".join(described) + f"; {plural(steps.rows, 'step')}.", "step", tuple(panels))


def _loss(run: Run) -> Panel:
    points = run.steps.loss
    label = _loss_label(run)
    if len(points) < SMOOTHED_FROM:
        return Panel(label, (Line(f"{points[-1][1]:.3f}", tuple(points)),))
    width = max(3, len(points) // 20) | 1
    smooth = running_mean(points, width)
    # The last windows of a running mean shrink: what stands beside the line is the mean of the last full one.
    end = sum(value for _, value in points[-width:]) / width
    return Panel(
        label,
        (
            Line("", thinned(points), 0, "faint"),
            Line(f"{end:.3f}, mean of {width} steps", thinned(smooth[: len(smooth) - width // 2])),
        ),
    )


def _loss_label(run: Run) -> str:
    """Which loss, where the manifest tells: kl, ce."""
    method = run.entry("method")
    settings = method.get("settings")
    kind = method.get("loss") or (settings.get("loss") if isinstance(settings, Mapping) else None)
    return LOSSES.get(str(kind), f"loss, {kind}") if kind else "loss"


def commitment(run: Run, name: str) -> HeatMap | str:
    """Share of 2:4 blocks after the last step, by decoder block and projection."""
    shares = _in_order(run, run.steps.layers)
    if not shares:
        return "commitment by layer: no row of metrics.jsonl has the layers' shares."
    low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    mean = sum(shares.values()) / len(shares)
    described = f"Least {percent(shares[low])} in {low}, most {percent(shares[high])} in {high}, mean of the layers {percent(mean)}."
    cells = grid(shares)
    if cells is None:
        return f"commitment by layer: {len(shares):,} layers are more than can be shown."
    return HeatMap(name, "Commitment: share of 2:4 blocks after the last step", described, "decoder block", "2:4 blocks", cells)


def changes(run: Run, name: str) -> HeatMap | str:
    """How often a block's mask changed in all, by decoder block and projection."""
    totals = _in_order(run, run.steps.changes)
    if not totals:
        return "mask changes by layer: no row of metrics.jsonl has mask_changes."
    high = max(totals, key=totals.__getitem__)
    cells = grid(totals)
    if cells is None:
        return f"mask changes by layer: {len(totals):,} layers are more than can be shown."
    looks = plural(len(run.steps.changed), "look")
    return HeatMap(
        name,
        "Mask changes of a block during learning",
        f"The sum over {looks} of the share of blocks whose mask changed since the last one. Most in {high}: {totals[high]:.2f}.",
        "decoder block",
        f"changes a block, of at most {len(run.steps.changed)}",
        cells,
        percent=False,
    )


def _in_order(run: Run, values: Mapping[str, float]) -> dict[str, float]:
    """In the model's order, which the manifest has."""
    names = run.manifest.get("parameters")
    order = {str(name): index for index, name in enumerate(names)} if isinstance(names, list) else {}
    return dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order))))


def measured_alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs with a perplexity, those together whose figures may be compared: same model, text and dtype."""
    alike: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.perplexity is not None:
            model = run.entry("model")
            key = [model.get("files") or run.model, run.entry("evaluation").get("fingerprint"), run.entry("config").get("dtype")]
            alike[json.dumps(key, sort_keys=True)].append(run)
    return list(alike.values())


def text_of(run: Run, key: str) -> str:
    """8 windows of 128 tokens of stdlib (heldout); empty where there was no text."""
    entry = run.entry(key)
    if not entry:
        return ""
    windows, seqlen, source = (entry.get(field, "?") for field in ("windows", "seqlen", "source"))
    return f"{windows} windows of {seqlen} tokens of {source}"


def perplexities(runs: Sequence[Run], name: str) -> Bars | str:
    """One bar a run that may be compared with the others, the dense model as a line."""
    if len(runs) < 2:
        return "perplexities side by side: needs two runs on the same model and text."
    if len(runs) > MOST_BARS:
        return f"perplexities side by side: {len(runs):,} runs are more than can be shown."
    if any(drawable(run.perplexity) is None for run in runs):
        return "perplexities side by side: one of them is beyond what can be drawn."
    dense = next((dense for run in runs if (dense := drawable(run.dense)) is not None), None)
    methods = _methods(runs)
    values = {run.label: run.perplexity for run in runs if run.perplexity is not None}
    bars = tuple(
        Bar(run.label, run.perplexity, figure(run.perplexity), methods.index(run.name)) for run in runs if run.perplexity is not None
    )
    best = min(values, key=values.__getitem__)
    measured = text_of(runs[0], "evaluation")
    return Bars(
        name,
        f"Perplexity of {runs[0].model}, lower is better",
        f"Lowest: {best} with {figure(values[best])}; dense {figure(dense)}." + (f" Measured on {measured}." if measured else ""),
        "perplexity",
        bars,
        None if dense is None else ("dense", dense),
        log=dense is not None and 0 < dense <= min(values.values()) and max(values.values()) > LOG_FROM * dense,
    )


def _methods(runs: Sequence[Run]) -> list[str]:
    """Each once; its place is its colour."""
    return list(dict.fromkeys(run.name for run in runs))


def over_windows(runs: Sequence[Run], name: str) -> Curves | str:
    """Perplexity against the number of calibration windows: one line for each method and its settings."""
    lines = {key: points for key, points in _series(runs).items() if len({x for x, _ in points}) > 1}
    methods = _methods(runs)
    if len(lines) > MOST_LINES:
        return f"perplexity against calibration windows: {len(lines):,} lines are more than can be shown."
    if not lines:
        return "perplexity against calibration windows: needs two runs of one method with different --samples."
    drawn = []
    for index, (label, points) in enumerate(lines.items()):
        color = methods.index(label) if label in methods else len(methods) + index  # of its bars, where there is one line a method
        means = {x: _mean([y for other, y in points if other == x]) for x in sorted({x for x, _ in points})}
        drawn += [Line("", tuple(sorted(points)), color, "dots"), Line(label, tuple(means.items()), color)]
    samples = sorted({x for points in lines.values() for x, _ in points})
    dense = next((dense for run in runs if (dense := drawable(run.dense)) is not None), None)
    described = [f"{label} from {figure(min(points)[1])} to {figure(max(points)[1])}" for label, points in lines.items()]
    return Curves(
        name,
        f"Perplexity of {runs[0].model} against calibration windows",
        f"{'; '.join(described)}; {samples[0]:g} to {samples[-1]:g} windows.",
        "calibration windows",
        (Panel("perplexity", tuple(drawn), height=240, level=None if dense is None else ("dense", dense)),),
        ticks=tuple(samples),
        log=samples[-1] >= 8 * samples[0] > 0,
    )


def _series(runs: Sequence[Run]) -> dict[str, list[tuple[float, float]]]:
    """Points (windows, perplexity) by method, settings that differ within it named."""
    groups: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if drawable(run.samples) and drawable(run.perplexity) is not None:
            groups[run.name][json.dumps(_settings(run), sort_keys=True)].append(run)
    series = {}
    for method, variants in groups.items():
        shown = [_settings(members[0]) for members in variants.values()]
        keys = {key for settings in shown for key in settings}
        differ = sorted(key for key in keys if len({json.dumps(settings.get(key)) for settings in shown}) > 1)
        for settings, members in zip(shown, variants.values(), strict=True):
            label = ", ".join([method, *(f"{key} {settings.get(key, 'default')}" for key in differ)])
            series[label] = [(float(run.samples or 0), run.perplexity or 0.0) for run in members]
    return series


def _settings(run: Run) -> dict[str, object]:
    """What was asked for and the defaults of its time, beside the number of windows and the seed."""
    config = run.entry("config")
    given = run.entry("method").get("settings")
    found = {**(given if isinstance(given, Mapping) else {}), **{key: config.get(key) for key in OF_THE_RUN}}
    return {key: value for key, value in found.items() if value is not None}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
