"""`pst bench`: measure the operations, the learning loop, and the pruned model at work, on this machine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pathlib import Path

    from ..benchmarks.table import Row

# WHAT -> the class of its settings in benchmarks/<what>.py
BENCHES = {
    "prox": "ProxBench",
    "masked": "MaskedBench",
    "step": "StepBench",
    "learn": "LearnBench",
    "linear": "LinearBench",
    "decode": "DecodeBench",
}
# Option -> field of the settings, where the two differ. A bench that has no such field refuses the option.
FIELDS = {"dtype": "dtypes", "shape": "shapes", "lambda": "lambdas", "model": "models"}
TITLES = {
    "prox": "prox_24: one tensor in, one out",
    "masked": "masked_weight_24: the pretrained weights under the mask of the learned ones",
    "step": "One optimiser step of one tensor",
    "learn": "The learning loop at real shapes, random weights, bf16, batch 1",
    "linear": "Linear layers on 2:4 weights against dense ones, bf16",
    "decode": "A whole model, dense with zeros and packed, bf16",
}
# Of the benches that have a second, shorter table: `summarise` in benchmarks/<what>.py makes it from the rows.
SUMMARIES = {"linear": "Where they break even with dense"}
QUICK_SHAPE = (256, 512)
QUICK: dict[str, dict[str, Any]] = {
    "prox": {"shapes": (QUICK_SHAPE,)},
    "masked": {"shapes": (QUICK_SHAPE,)},
    "step": {"shapes": (QUICK_SHAPE,)},
    "learn": {"models": ("tiny",), "steps": 4},
    "linear": {"shapes": (QUICK_SHAPE,), "tokens": (1, 64)},
    "decode": {"models": ("tiny",), "batch": (1, 2), "prompt": 16, "new_tokens": 8, "compile": False},
}


def _shapes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """4096x11008 -> (4096, 11008)."""
    shapes = []
    for value in values:
        parts = value.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise click.BadParameter(f"expected OUTxIN such as 4096x11008, got {value!r}", ctx, param)
        shapes.append((int(parts[0]), int(parts[1])))
    return tuple(shapes)


@click.command()
@click.argument("what", type=click.Choice([*BENCHES, "all"]), default="all")
@click.option(
    "--dtype", multiple=True, type=click.Choice(["bfloat16", "float32"]), help="prox, masked, step: of the weights. [default: both]"
)
@click.option(
    "--shape",
    multiple=True,
    metavar="OUTxIN",
    callback=_shapes,
    help="prox, masked, step, linear: of the weight matrix; may be repeated. [default: the layers of Llama-2-7B]",
)
@click.option("--lambda", "lambda", multiple=True, type=float, help="prox, step: lambda1 x rms of the weights; may be repeated.")
@click.option("--lambda2", type=float, help="step, learn: the frozen-weight penalty; learn: 0 turns it off. [default: 0.25]")
@click.option(
    "--model",
    multiple=True,
    help="learn, linear (its layers), decode: llama-2-7b (default), llama-3.1-8b, llama-2-13b, qwen2.5-14b, tiny; decode: or a folder; "
    "may be repeated.",
)
@click.option("--steps", type=int, help="learn: steps of each loop. [default: 20]")
@click.option(
    "--tokens",
    multiple=True,
    type=int,
    help="learn: tokens of a step. [default: 4096] linear: tokens of a batch; may be repeated. [default: 1, 2, 4 ... 16384]",
)
@click.option("--save", is_flag=True, default=None, help="linear: SparseLinear uses the fastest ways from now on; all counts are measured.")
@click.option("--batch", multiple=True, type=int, help="decode: sequences at a time; may be repeated. [default: 1, 8, 32]")
@click.option("--prompt", type=int, help="decode: tokens of each prompt. [default: 128]")
@click.option("--new-tokens", type=int, help="decode: tokens of each answer. [default: 64]")
@click.option("--compile/--no-compile", default=None, help="decode: the step by torch.compile. [default: on a GPU]")
@click.option("--weight-bits", type=click.Choice(["16", "24", "32"]), help="learn: bits kept of a bf16 weight. [default: by model size]")
@click.option("--moments", type=click.Choice(["float32", "bfloat16", "int8"]), help="learn: how they are stored. [default: by model size]")
@click.option("--checkpointing/--no-checkpointing", default=None, help="learn: of activations. [default: where it does not fit without]")
@click.option("--recipe", type=click.Choice(["paper", "auto"]), help="learn: what is learned from. [default: paper]")
@click.option("--loss", type=click.Choice(["kl", "ce"]), help="learn: instead of the recipe's.")
@click.option("--clip-mode", type=click.Choice(["total", "loss"]), help="learn: the norm of which gradient is clipped. [default: total]")
@click.option(
    "--rival/--no-rival",
    default=None,
    help="prox: the published algorithm, eager and compiled. masked: torch. step: torch's fused AdamW. learn: plain AdamW. "
    "[default: on; prox: one shape, two strengths]",
)
@click.option("--rounds", type=int, help="Repeats of each measurement but learn's. [default: 30; linear 7; decode, or on a CPU, 5]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is a GPU]")
@click.option("--quick", is_flag=True, help="Small shapes and few rounds: a smoke test, not a measurement.")
@click.option("-o", "--output", metavar="FILE.csv", help="Add the rows to a CSV file, e.g. bench/results/nvidia-h200-prox.csv.")
@click.option("--commit", help="Recorded with the rows. [default: git's HEAD]")
@click.option("--plot", metavar="FILE.png", help="linear: speed-up over tokens; decode: tokens a second. Needs matplotlib.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the tables.")
def bench(what: str, output: str | None, commit: str | None, plot: str | None, as_json: bool, quick: bool, **options: Any) -> None:
    """Measure WHAT on this machine: prox, masked, step, learn, linear, decode or all (default).

    Every result is checked against the reference first. Times are medians with 20 and 80 % quantiles, rivals run interleaved, and the roof
    is the bandwidth of a large copy measured in the same run. Without a GPU the plain-torch reference is measured.
    """
    from pathlib import Path

    from ..benchmarks.table import append_csv, environment, read_csv
    from .console import console_progress

    rounds = options.pop("rounds")
    place = _machine(options.pop("device"), rounds, quick)
    names = list(BENCHES) if what == "all" else [what]
    benches = {name: _settings(name, what, options, rounds, quick) for name in names}
    # Refused before the work, not after it.
    if output is not None:
        read_csv(Path(output))
    if plot is not None:
        _check_plot(names, Path(plot))
    facts = environment(place.device, commit)
    found: dict[str, list[Row]] = {name: [] for name in names}
    with console_progress() as progress:
        if place.device.type == "cpu":
            progress.note(_not_measured(names))
        for name, settings in benches.items():
            try:
                for row in settings.run(place, progress):
                    found[name].append({**row, **facts})
            finally:
                # What was measured before a failure is kept.
                if output is not None and found[name]:
                    append_csv(Path(output), found[name])
    _print(found, facts, as_json)
    if plot is not None:
        from ..benchmarks.plot import plot as draw

        draw([row for rows in found.values() for row in rows], Path(plot))


def _check_plot(names: list[str], path: Path) -> None:
    from ..benchmarks.plot import PLOTTED, check_plot
    from ..errors import ConfigError

    if not set(names) & set(PLOTTED):
        raise ConfigError(f"bench {names[0]}: expected --plot with {' or '.join(PLOTTED)} only. Leave it out.")
    check_plot(path)


def _machine(device: str | None, rounds: int | None, quick: bool) -> Any:
    import torch

    from ..benchmarks.timer import machine
    from ..errors import BackendError, ConfigError

    if rounds is not None and rounds < 1:
        raise ConfigError(f"bench: expected --rounds of at least 1, got {rounds}. Choose another value.")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("bench: expected a CUDA GPU for --device cuda, got none. Use --device cpu, or install torch with CUDA.")
    place = machine(device or ("cuda" if torch.cuda.is_available() else "cpu"), quick=quick)
    return place if rounds is None else dataclasses.replace(place, rounds=rounds)


def _settings(name: str, what: str, options: dict[str, Any], rounds: int | None, quick: bool) -> Any:
    """The bench's settings from the options that were given. ConfigError for an option of another bench."""
    import importlib

    from ..errors import ConfigError

    kind = getattr(importlib.import_module(f"..benchmarks.{name}", __package__), BENCHES[name])
    known = {field.name for field in dataclasses.fields(kind)}
    settings = dict(QUICK[name]) if quick else {}
    if rounds is not None and "rounds" in known:  # else the machine's, whose default is another
        settings["rounds"] = rounds
    for option, value in options.items():
        if value is None or value == ():
            continue
        field = FIELDS.get(option, option)
        if field in known:
            settings[field] = _value(name, field, value)
        elif what != "all":
            raise ConfigError(f"bench {name}: expected its own options, got --{option.replace('_', '-')}. Leave it out.")
    return kind(**settings)


def _value(name: str, field: str, value: Any) -> Any:
    """As the settings have it: a number where a bench takes one, and the option may be repeated for others."""
    from ..errors import ConfigError

    if (name, field) != ("learn", "tokens"):
        return int(value) if field == "weight_bits" else value
    if len(value) > 1:
        raise ConfigError(f"bench learn: expected --tokens once, got {', '.join(map(str, value))}. Choose one.")
    return value[0]


def _not_measured(names: list[str]) -> str:
    """What a machine without a GPU cannot tell."""
    missing = {
        "prox": "the prox kernel and its share of the copy bandwidth, the compiled rival, scratch memory",
        "masked": "the kernel and its share of the copy bandwidth, the compiled rival, scratch memory",
        "step": "the fused kernel and its share of the copy bandwidth",
        "learn": "models of real size, GPU memory",
        "linear": "our kernel, the sparse library, CUDA graphs",
        "decode": "models of real size, our kernel, CUDA graphs, GPU memory",
    }
    return f"No GPU: the plain-torch reference is measured on the CPU. Not measured: {'; '.join(missing[name] for name in names)}."


def _print(found: dict[str, list[Row]], facts: Row, as_json: bool) -> None:
    import importlib
    import json

    from ..benchmarks.table import cells, described
    from .console import print_table

    summaries = {
        name: importlib.import_module(f"..benchmarks.{name}", __package__).summarise(rows)
        for name, rows in found.items()
        if name in SUMMARIES
    }
    if as_json:
        report: dict[str, Any] = {"environment": facts, "rows": [row for rows in found.values() for row in rows]}
        click.echo(json.dumps(report | ({"summaries": summaries} if summaries else {}), indent=2))
        return
    for name, rows in found.items():
        titles, texts = cells(rows)
        print_table(TITLES[name], titles, texts, note=described(facts))
        if name in summaries:
            print_table(SUMMARIES[name], *cells(summaries[name]))
