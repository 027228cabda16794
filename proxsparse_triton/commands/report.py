"""`pst report`: finished runs as one HTML page."""

from __future__ import annotations

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option("-o", "--output", metavar="FILE.html", help="The page to write. [default: report.html in the first RUN]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the line.")
def report(runs: tuple[str, ...], output: str | None, as_json: bool) -> None:
    """Write what is known of the folders RUN (of `pst prune` or `pst compare`) as one HTML page that works offline.

    Loss and 2:4 blocks over steps, layer by layer, settings and manifest; of several runs perplexities, times and sizes side by side, and
    perplexity against calibration windows. Where matplotlib is installed, the charts are also written as PNG to FILE/ (FILE-report/ where
    FILE is the run). A page that pst
    wrote before is replaced.
    """
    import json
    from pathlib import Path

    from ..report import write_report

    page = Path(runs[0]) / "report.html" if output is None else Path(output)
    written = write_report([Path(run) for run in runs], page)
    for note in written.notes:
        click.echo(note, err=True)
    if as_json:
        click.echo(json.dumps({"page": str(page), "pictures": list(map(str, written.pictures)), "notes": list(written.notes)}, indent=2))
        return
    pictures = f", {len(written.pictures)} PNG pictures in {written.pictures[0].parent}" if written.pictures else ""
    click.echo(f"{page}: written{pictures}")
