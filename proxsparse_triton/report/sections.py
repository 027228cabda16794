"""The parts of the page, each as HTML; every text from a folder goes through `escape`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from . import svg
from .charts import Chart
from .figures import text_of
from .reading import Run
from .steps import number, numbers
from .text import duration, figure, increase, percent, plural, setting, size

HEADLINE = ("recipe", "loss", "forward", "prox_scale", "steps", "lambda1", "lambda2", "lr", "dampening", "mask_only")
MOST_WARNINGS = 20
MOST_LAYERS = 20  # of a table before the rest is folded

Row = Sequence[str]


def table(titles: Row, rows: Iterable[Row], *, left: int = 1) -> str:
    """Cells are HTML already; the first `left` columns are text, the others numbers."""

    def cells(tag: str, row: Row) -> str:
        kinds = [' class="name"' if index < left else ' class="n"' for index in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", titles)}</tr></thead><tbody>{body}</tbody></table></div>'


def chart(drawn: Chart) -> str:
    return (
        f'<figure><h3>{escape(drawn.title)}</h3><div class="wide">{svg.draw(drawn)}</div>'
        f"<figcaption>{escape(drawn.description)}</figcaption></figure>"
    )


def left_out(reasons: Sequence[str]) -> str:
    """What is not on the page, and why."""
    return "".join(f'<p class="muted">Left out: {escape(reason)}</p>' for reason in reasons)


def lead(run: Run) -> str:
    """The run in two sentences."""
    said = []
    if run.perplexity is not None:
        against = "" if run.dense is None else f" against {figure(run.dense)} of the dense model"
        on = text_of(run, "evaluation")
        said.append(f"Perplexity {figure(run.perplexity)}{against}{', on ' + on if on else ''}.")
    calibrated = text_of(run, "calibration") if run.samples else ""
    if calibrated:
        said.append(f"Calibrated on {calibrated}.")
    if run.manifest:
        said.append(_weights(run))
    if run.share is not None:
        said.append(run.share.warning or f"Pruned to 2:4 is {run.share}.")
    how = recipe(run)
    return (f'<p class="lead">{escape(" ".join(said))}</p>' if said else "") + (f'<p class="muted">{escape(how)}</p>' if how else "")


def recipe(run: Run) -> str:
    """What decides most about the mask, in a line; the whole list is among the settings."""
    method = run.entry("method")
    given = method.get("settings")
    values = {**(given if isinstance(given, Mapping) else {}), **{key: value for key, value in method.items() if value is not None}}
    shown = [f"{key} {setting(values[key])}" for key in HEADLINE if values.get(key) is not None]
    return f"{run.method}: {', '.join(shown)}." if shown else ""


def _weights(run: Run) -> str:
    if run.repair is not None:
        return f"The weights that are kept were repaired ({run.repair})."
    if run.manifest.get("weights_updated"):
        return "The method changed the weights that it kept."
    return "The weights that are kept are the original ones." if run.manifest.get("weights_updated") is False else ""


def tiles(run: Run) -> str:
    """Headline figures; those the run does not have are left out."""
    share = number(run.entry("method").get("share_24"))
    if share is None and run.steps.share:
        share = run.steps.share[-1][1]
    shown = [
        ("perplexity, pruned", figure(run.perplexity), increase(run.perplexity, run.dense), run.perplexity),
        ("perplexity, dense", figure(run.dense), "", run.dense),
        ("time of the method", duration(run.seconds), _device(run), run.seconds),
        ("peak memory", size(run.peak_memory), "of the process" if run.manifest.get("gpu") is None else "of the GPU", run.peak_memory),
        ("layers pruned to 2:4", f"{run.layers:,}" if run.layers is not None else "", _skipped(run), run.layers),
        ("weights pruned to 2:4", percent(None if run.share is None else run.share.fraction), "of the decoder", run.share),
        ("2:4 blocks after the last step", percent(share), plural(run.steps.rows, "step"), share),
    ]
    parts = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(more)}</small>' if more not in ('', '-') else ''}</dd></div>"
        for name, value, more, known in shown
        if known is not None
    ]
    return f'<dl class="tiles">{"".join(parts)}</dl>' if parts else ""


def _device(run: Run) -> str:
    return str(run.manifest.get("gpu") or run.manifest.get("device") or "")


def _skipped(run: Run) -> str:
    skipped = run.entry("skipped")
    return f"{len(skipped)} left dense" if skipped else ""


def warnings(run: Run) -> str:
    """What the steps said, each text once."""
    if not run.steps.warnings:
        return ""
    rows = [(escape(text), _steps(steps)) for text, steps in run.steps.warnings.items()]
    more = f'<p class="muted">and {len(rows) - MOST_WARNINGS} more.</p>' if len(rows) > MOST_WARNINGS else ""
    return f"<h3>Warnings</h3>{table(('warning', 'steps'), rows[:MOST_WARNINGS])}{more}"


def _steps(steps: Sequence[int]) -> str:
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} ({len(steps):,})"


def agreement(run: Run) -> str | None:
    """Share of blocks that other methods would have decided alike; None without such figures."""
    found = numbers(run.entry("method").get("agreement"))
    if not found and run.magnitude_agreement is not None:
        found = {"magnitude": run.magnitude_agreement}
    if not found:
        return None
    rows = [(escape(name), percent(share)) for name, share in sorted(found.items(), key=lambda item: -item[1])]
    return f"<h3>Agreement with other masks</h3>{table(('masks of', 'blocks decided alike'), rows)}"


def restored(run: Run) -> str | None:
    """Layers by what the perplexity gains when one of them alone is dense again; None without such figures."""
    listed = run.entry("method").get("restore")
    found = {
        str(entry.get("layer")): value
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, Mapping) and (value := number(entry.get("perplexity"))) is not None
    }
    if not found:
        return None
    base = number(run.entry("method").get("restore_pruned"))  # on the same windows, which may be fewer than the run's
    base = run.perplexity if base is None else base
    titles = ("layer made dense again", "perplexity", *(("gain",) if base is not None else ()))
    rows = [
        (escape(layer), figure(value), *((f"{base - value:+.3f}",) if base is not None else ()))
        for layer, value in sorted(found.items(), key=lambda item: item[1])
    ]
    rest = rows[MOST_LAYERS:]
    more = f"<details><summary>{plural(len(rest), 'more layer')}</summary>{table(titles, rest)}</details>" if rest else ""
    return f"<h3>Layers that lose most</h3>{table(titles, rows[:MOST_LAYERS])}{more}"


def settings(run: Run, *, unfolded: bool) -> str:
    """What was asked for, and what the method derived; empty for an unfinished run."""
    method, config = run.entry("method"), run.entry("config")
    if not method and not config:
        return ""
    given = method.get("settings")
    asked = dict(given) if isinstance(given, Mapping) else {}
    rows = []
    for key, value in asked.items():
        derived = value is None and method.get(key) is not None
        rows.append((key, f"{setting(method[key])} (derived)" if derived else setting(value)))
    for key, value in method.items():
        if key not in {"name", "settings", *asked} and not isinstance(value, list | Mapping):
            rows.append((key, setting(value)))
    rows += [(key, setting(config.get(key))) for key in ("seed", "dtype", "include", "skip", "windows") if config.get(key)]
    for key in ("calibration", "evaluation"):
        if text_of(run, key) and (key == "evaluation" or run.samples):
            rows.append((key, text_of(run, key)))
    if run.repair is not None:
        rows.append(("repair", setting(method.get("repair") or run.repair)))
    versions = run.entry("versions")
    rows += [("machine", ", ".join(filter(None, (_device(run), str(run.manifest.get("platform") or "")))))]
    rows += [("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))] if versions else []
    rows += [("finished", str(run.manifest.get("created")))] if run.manifest.get("created") else []
    listed = table(("setting", "value"), [(escape(name), escape(value)) for name, value in rows if value], left=2)
    return f"<details{' open' if unfolded else ''}><summary>Settings</summary>{listed}</details>"


def repeat(run: Run) -> str:
    """The command line, and the manifest to unfold."""
    parts = []
    if run.command is not None:
        parts.append(f'<h3>Command</h3><pre class="line">{escape(run.command)}</pre>')
    if run.text:
        parts.append(f"<details><summary>manifest.json</summary><pre>{escape(run.text)}</pre></details>")
    return "".join(parts)


def overview(runs: Sequence[Run], anchors: Mapping[str, str]) -> str:
    """One row a run, the dense model above those it belongs to."""
    with_agreement = any(run.magnitude_agreement is not None for run in runs)
    titles = ["run", "windows", "perplexity", "against dense", "time", "peak memory", "weights on disk", "masks on disk"]
    titles += ["same blocks as magnitude"] if with_agreement else []
    rows, above = [], None
    for run in runs:
        dense = (run.model, figure(run.dense))
        if run.dense is not None and dense != above:
            rows.append([f"dense {escape(run.model)}", "", figure(run.dense), *[""] * (len(titles) - 3)])
            above = dense
        rows.append(
            [
                f'<a href="#{anchors[run.label]}">{escape(run.label)}</a>',
                "-" if run.samples is None else f"{run.samples:,}",
                figure(run.perplexity),
                increase(run.perplexity, run.dense),
                duration(run.seconds),
                size(run.peak_memory),
                size(run.weights_bytes),
                size(run.masks_bytes),
                *([percent(run.magnitude_agreement)] if with_agreement else []),
            ]
        )
    return table(titles, rows)
