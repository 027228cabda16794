"""`pst compare`: several methods on the same text, one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import METHOD_OPTIONS, RUN_OPTIONS, method_settings, run_config, with_options

if TYPE_CHECKING:
    from ..comparison import Comparison
    from ..pipeline import RunRecord

DEFAULT_METHODS = "magnitude,wanda,sparsegpt,proxsparse"


@click.command()
@click.argument("model")
@click.option("--methods", default=DEFAULT_METHODS, show_default=True, metavar="A,B,C", help="Methods to run.")
@with_options(RUN_OPTIONS)
@with_options(METHOD_OPTIONS)
def compare(model: str, methods: str, as_json: bool, **options: Any) -> None:
    """Prune MODEL with several methods on the same calibration text and print one table, the dense model on top.

    RUN gets one complete run folder per method. Options of a method (--lambda1, --dampening, ...) go to the methods that have them.
    """
    import dataclasses

    from ..comparison import compare as run
    from ..errors import ConfigError
    from ..methods.base import method_class
    from .console import console_progress

    names = [name.strip() for name in methods.split(",") if name.strip()]
    given = method_settings(options)
    fields = {name: {field.name for field in dataclasses.fields(method_class(name))} for name in names}
    for key in given:
        if not any(key in known for known in fields.values()):
            option = f"--{key.replace('_', '-')}"
            raise ConfigError(f"compare: expected options of the methods {', '.join(names)}, got {option}. Leave it out.")
    settings = {name: {key: value for key, value in given.items() if key in fields[name]} for name in names}
    config = run_config(model, options)
    with console_progress() as progress:
        result = run(config, names, settings, progress)
    _print(result, model, as_json)


# What a newcomer should read beside the name.
DESCRIPTIONS = {
    "magnitude": "keep the 2 largest of 4 weights",
    "wanda": "largest weight x input norm",
    "sparsegpt": "by the Hessian; changes the kept weights",
    "proxsparse": "learned end to end; original weights kept",
}


def _description(record: RunRecord) -> str:
    said = DESCRIPTIONS.get(record.method, "")
    return said if record.repair is None else f"{said.split(';')[0]}; kept weights repaired ({record.repair})"


def _print(result: Comparison, model: str, as_json: bool) -> None:
    import json

    from ..evaluation.perplexity import finite
    from .console import figure, print_table, size

    inputs, share = result.inputs, result.inputs.plan.share()
    if as_json:
        rows = [
            {
                "method": row.record.method,
                "perplexity": finite(row.record.perplexity),
                "seconds": round(row.record.seconds, 3),
                "peak_memory_bytes": row.record.peak_memory,
                "magnitude_agreement": row.magnitude_agreement,
                "repair": row.record.repair,
                "share": row.record.share.fraction,
            }
            for row in result.rows
        ]
        on = None if inputs.evaluation is None else inputs.evaluation.record()
        dense = finite(inputs.dense_perplexity)
        report = {"model": model, "evaluation": on, "dense_perplexity": dense, "decoder": share.as_json(), "rows": rows}
        click.echo(json.dumps(report, indent=2))
        return
    table = [("dense", "the original model", figure(inputs.dense_perplexity), "", "", "")]
    for row in result.rows:
        record = row.record
        table.append(
            (
                record.method,
                _description(record),
                figure(record.perplexity),
                f"{record.seconds:.1f} s",
                size(record.peak_memory),
                f"{100 * row.magnitude_agreement:.1f} %",
            )
        )
    text = inputs.evaluation
    measured = "" if text is None else f"Perplexity (lower is better) on {text.described()}. "
    calibrated = inputs.calibration
    learnt = "" if calibrated is None else f"Calibrated on {calibrated.described()}. "
    print_table(
        f"{model}: 2 of every 4 weights removed",
        ("method", "how it chooses", "perplexity", "time", "peak memory", "same blocks as magnitude"),
        table,
        note=f"{measured}{learnt}Pruned to 2:4 is {share}.",
        left=2,
    )
    if share.warning:
        click.echo(share.warning)
