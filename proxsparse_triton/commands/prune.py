"""`pst prune`: a model and text in, a 2:4 model out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import METHOD_OPTIONS, RUN_OPTIONS, method_settings, run_config, with_options

if TYPE_CHECKING:
    from ..pipeline import RunRecord
    from ..planning import MemoryPlan, RunPlan


@click.command()
@click.argument("model")
@click.option("--method", default="proxsparse", show_default=True, help="magnitude, wanda, sparsegpt or proxsparse.")
@click.option("--preset", metavar="NAME", help="proxsparse: recipe paper with a model's published values (llama-2-7b, ...).")
@click.option("--plan", is_flag=True, help="Print predicted peak memory and time, and do nothing: no weight is read.")
@click.option("--gpu-memory", type=float, metavar="GB", help="Keep within so many GB (10^9 bytes). [default: the GPU's memory]")
@with_options(RUN_OPTIONS)
@with_options(METHOD_OPTIONS)
def prune(model: str, method: str, preset: str | None, plan: bool, gpu_memory: float | None, as_json: bool, **options: Any) -> None:
    """Prune MODEL (a folder, a Hub id, or `demo`) to 2:4 and write it to RUN, an ordinary Hugging Face folder.

    RUN also holds masks.safetensors, manifest.json (settings, hashes, versions, perplexities) and metrics.jsonl (loss and share of
    2:4 blocks at every step). Original weights are kept bit for bit unless the method updates them (sparsegpt without --mask-only).
    """
    derived = [name for name in ("lambda1", "lr") if options[name] == "auto"]
    settings = method_settings(options)
    if preset is not None:
        from ..errors import ConfigError
        from ..methods.presets import preset as published

        if method != "proxsparse":
            raise ConfigError(f"prune: expected --preset with --method proxsparse only, got --method {method}. Leave --preset out.")
        against = ["--recipe auto"] if settings.get("recipe") == "auto" else [f"--{name} auto" for name in derived]
        if against:
            raise ConfigError(f"prune: expected --preset {preset}, published values, without {against[0]}. Leave one of them out.")
        values: dict[str, Any] = {"recipe": "paper", **published(preset)}
        seqlen = values.pop("seqlen")
        options["seqlen"] = seqlen if options["seqlen"] is None else options["seqlen"]
        settings = {**values, **settings}
    config = run_config(model, options, method=method, settings=settings, gpu_memory=gpu_memory)
    if plan:
        from ..planning import plan_run

        _print_plan(plan_run(config), model, as_json)
        return
    from ..pipeline import prune as run
    from .console import console_progress

    with console_progress() as progress:
        record = run(config, progress)
    _print(record, as_json)


def _print_plan(run: RunPlan, model: str, as_json: bool) -> None:
    import json

    from .console import print_table, size

    plan = run.plan
    if as_json:
        report = {
            "peak_bytes": plan.peak,
            "items": plan.items,
            "steps": plan.steps,
            "seconds": plan.seconds,
            "gpu_memory_bytes": run.memory,
            "fits": run.fits,
            "settings": _choices(plan),
            "change": list(run.change),
            "changed_peak_bytes": None if run.changed is None else run.changed.peak,
            "decoder": plan.share.as_json(),
        }
        click.echo(json.dumps(report, indent=2))
        return
    rows = [(name, size(count)) for name, count in plan.items.items() if count]
    rows += [("peak", size(plan.peak)), ("time", _time(plan))]
    rows += [(name.replace("_", "-"), str(value)) for name, value in _choices(plan).items()]
    rows += [("weights pruned to 2:4", str(plan.share))]
    print_table(f"plan of {model}: {plan.steps} steps", ("", "predicted"), rows)
    if plan.share.warning:
        click.echo(plan.share.warning)
    click.echo(_verdict(run))


def _choices(plan: MemoryPlan) -> dict[str, object]:
    """What was decided for this model where it was not asked for."""
    settings = plan.settings
    return {"weight_bits": settings.weight_bits, "moments": settings.moments, "checkpointing": settings.checkpointing}


def _time(plan: MemoryPlan) -> str:
    return "not known for this device" if plan.seconds is None else f"{plan.seconds / 60:.1f} minutes"


def _verdict(run: RunPlan) -> str:
    from .console import size

    if run.memory is None:
        return "No GPU here to hold it against: give its size with --gpu-memory GB."
    if run.fits:
        return f"fits into {size(run.memory)}"
    if run.changed is None:
        return f"does not fit into {size(run.memory)}, whatever the precision: lower --seqlen, or take a larger GPU"
    return f"does not fit into {size(run.memory)}; with {' '.join(run.change)} it would, at {size(run.changed.peak)}"


def _print(record: RunRecord, as_json: bool) -> None:
    import json

    from ..evaluation.perplexity import finite
    from .console import figure, print_table, size

    if as_json:
        report = {
            "method": record.method,
            "repair": record.repair,
            "output": str(record.folder),
            "perplexity": {"dense": finite(record.dense_perplexity), "pruned": finite(record.perplexity)},
            "evaluation": None if record.evaluation is None else record.evaluation.record(),
            "seconds": round(record.seconds, 3),
            "peak_memory_bytes": record.peak_memory,
            "layers": len(record.parameters),
            "decoder": record.share.as_json(),
        }
        click.echo(json.dumps(report, indent=2))
        return
    repaired = "" if record.repair is None else f", repaired ({record.repair})"
    rows = [
        ("layers pruned to 2:4", str(len(record.parameters))),
        ("weights pruned to 2:4", str(record.share)),
        ("perplexity, dense", figure(record.dense_perplexity)),
        (f"perplexity, {record.method}{repaired}", figure(record.perplexity)),
        ("seconds", f"{record.seconds:.1f}"),
        ("peak memory", size(record.peak_memory)),
    ]
    note = "" if record.evaluation is None else f"Perplexity (lower is better) on {record.evaluation.described()}."
    print_table(str(record.folder), ("", "value"), rows, note=note)
    if record.share.warning:
        click.echo(record.share.warning)
