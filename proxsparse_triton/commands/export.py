"""`pst export`: a pruned model as a dense folder, as masks, or packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..export import ExportRecord


@click.command()
@click.argument("run")
@click.option("--format", required=True, type=click.Choice(["dense", "masks", "packed"]), help="What to write.")
@click.option("-o", "--output", required=True, metavar="OUT", help="Folder to write; must not exist, or be empty.")
@click.option(
    "--include", multiple=True, metavar="REGEX", help="Without masks or manifest: only layers whose name matches. May be repeated."
)
@click.option("--skip", multiple=True, metavar="REGEX", help="Without masks or manifest: layers that stay dense. May be repeated.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run or export of pst at OUT (never anything else).")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the line.")
def export(
    run: str,
    format: str,
    output: str,
    include: tuple[str, ...],
    skip: tuple[str, ...],
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Write the 2:4 model RUN (a run of `pst prune`, or any dense 2:4 folder or Hub id) to the folder OUT in another form.

    dense: the model alone, zeros included. masks: masks.safetensors. packed: kept weights and their positions, 9/16 of the bytes of the
    pruned layers (16-bit weights), bit for bit the same model; proxsparse_triton.load_packed loads it.
    """
    from ..export import export_run
    from .console import console_progress
    from .options import output_path

    with console_progress() as progress:
        record = export_run(
            run,
            output_path(output),
            format=format,
            include=include,
            skip=skip,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _print(record, as_json)


def _print(record: ExportRecord, as_json: bool) -> None:
    import json

    from ..formats.folder import readable_bytes

    share = record.bytes / record.source_bytes
    if as_json:
        report = {
            "format": record.format,
            "output": str(record.folder),
            "layers": len(record.layers),
            "bytes": record.bytes,
            "source_bytes": record.source_bytes,
            "share": round(share, 4),
        }
        click.echo(json.dumps(report, indent=2))
        return
    sizes = f"{readable_bytes(record.bytes)}, {share:.3f} of the dense weights ({readable_bytes(record.source_bytes)})"
    click.echo(f"{record.folder}: {record.format}, {len(record.layers)} pruned layers, {sizes}")
