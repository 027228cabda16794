"""`pst verify`: is a model folder 2:4, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..formats.verify import LayerReport, VerifyReport


@click.command()
@click.argument("path", type=click.Path(path_type=str))
@click.option(
    "--original", metavar="MODEL", help="Also check that kept weights are this model's, bit for bit: a folder, a Hub id or `demo`."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(path: str, original: str | None, as_json: bool) -> None:
    """Check layer by layer that the model folder PATH is 2:4.

    A folder that pst wrote is checked against its own masks, a packed one against its hashes and positions; in any other one every
    weight matrix inside the decoder blocks must keep at most two of every four weights. Exit code 1 when something is wrong.
    """
    from pathlib import Path

    from ..errors import ModelError
    from ..formats.verify import verify_folder
    from .console import console_progress

    folder = None
    if original is not None:
        from ..models.loading import resolve_model

        folder = resolve_model(original).folder
    with console_progress() as progress:
        report = verify_folder(Path(path), original=folder, progress=progress)
    if as_json:
        _print_json(report)
    else:
        _print_report(report)
    if not report.ok:
        more = f" ({len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
        rule, advice = f"a 2:4 model in {path}", "Prune the model again."
        if report.only_files:
            rule = f"the files of {path} as they were written"
            advice = "Copy the folder again; if the change is yours, the weights are 2:4 all the same."
        raise ModelError(f"verify: expected {rule}, got: {report.problems[0]}{more}. {advice}")


def _print_json(report: VerifyReport) -> None:
    import dataclasses
    import json

    click.echo(json.dumps({"ok": report.ok, **dataclasses.asdict(report), "decoder": report.decoder.as_json()}, indent=2))


def _print_report(report: VerifyReport) -> None:
    from .console import print_table

    columns = ["layer", "blocks", ">2 kept", "-0.0", "zeros"]
    columns += ["not +0.0"] if report.masks else []
    columns += ["changed"] if report.original is not None else []
    rows = [[*_row(layer, report), "ok" if not layer.problem else "wrong"] for layer in report.layers]
    print_table(report.path, [*columns, "2:4"], rows)
    passed = sum(layer.wrong_blocks == 0 for layer in report.layers)
    notes = [f"{passed} of {len(report.layers)} layers are 2:4, {report.decoder}"]
    negative = sum(layer.negative_zeros for layer in report.layers)
    if negative:
        notes.append(f"{negative} weights are -0.0, which some 2:4 tools take for kept ones")
    if report.original is not None:
        changed = sum(layer.changed or 0 for layer in report.layers)
        how = "as its method does" if report.weights_updated else "which it must not"
        notes.append(f"{changed} kept weights differ from {report.original}, {how}" if changed else f"kept weights equal {report.original}")
    click.echo("; ".join(notes))
    if report.decoder.warning:
        click.echo(report.decoder.warning)


def _row(layer: LayerReport, report: VerifyReport) -> list[str]:
    row = [layer.name, f"{layer.blocks:,}", f"{layer.wrong_blocks:,}", f"{layer.negative_zeros:,}", f"{layer.zeros:.1%}"]
    if report.masks:
        row.append("-" if layer.not_zeroed is None else f"{layer.not_zeroed:,}")
    if report.original is not None:
        row.append("-" if layer.changed is None else f"{layer.changed:,}")
    return row
