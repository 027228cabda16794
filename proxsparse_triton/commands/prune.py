"""`pst prune`: a model and text in, a 2:4 model out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import METHOD_OPTIONS, RUN_OPTIONS, method_settings, run_config, with_options

if TYPE_CHECKING:
    from ..pipeline import RunRecord


@click.command()
@click.argument("model")
@click.option("--method", default="proxsparse", show_default=True, help="magnitude, wanda, sparsegpt or proxsparse.")
@click.option("--preset", metavar="NAME", help="proxsparse: the published lambda1, lr and seqlen of a model (llama-2-7b, ...).")
@with_options(RUN_OPTIONS)
@with_options(METHOD_OPTIONS)
def prune(model: str, method: str, preset: str | None, as_json: bool, **options: Any) -> None:
    """Prune MODEL (a folder, a Hub id, or `demo`) to 2:4 and write it to RUN, an ordinary Hugging Face folder.

    RUN also holds masks.safetensors, manifest.json (settings, hashes, versions, perplexities) and metrics.jsonl (loss and share of
    2:4 blocks at every step). Original weights are kept bit for bit unless the method updates them (sparsegpt without --mask-only).
    """
    settings = method_settings(options)
    if preset is not None:
        from ..errors import ConfigError
        from ..methods.presets import preset as published

        if method != "proxsparse":
            raise ConfigError(f"prune: expected --preset with --method proxsparse only, got --method {method}. Leave --preset out.")
        values: dict[str, Any] = published(preset)
        seqlen = values.pop("seqlen")
        options["seqlen"] = seqlen if options["seqlen"] is None else options["seqlen"]
        settings = {**values, **settings}
    from ..pipeline import prune as run
    from .console import console_progress

    config = run_config(model, options, method=method, settings=settings)
    with console_progress() as progress:
        record = run(config, progress)
    _print(record, as_json)


def _print(record: RunRecord, as_json: bool) -> None:
    import json

    from .console import figure, print_table, size

    if as_json:
        report = {
            "method": record.method,
            "output": str(record.folder),
            "perplexity": {"dense": record.dense_perplexity, "pruned": record.perplexity},
            "seconds": round(record.seconds, 3),
            "peak_memory_bytes": record.peak_memory,
            "layers": len(record.parameters),
        }
        click.echo(json.dumps(report, indent=2))
        return
    rows = [
        ("layers pruned to 2:4", str(len(record.parameters))),
        ("perplexity, dense", figure(record.dense_perplexity)),
        (f"perplexity, {record.method}", figure(record.perplexity)),
        ("seconds", f"{record.seconds:.1f}"),
        ("peak memory", size(record.peak_memory)),
    ]
    print_table(str(record.folder), ("", "value"), rows)
