"""Options that `pst prune` and `pst compare` share, and the settings they turn into."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..pipeline import RunConfig

Command = Callable[..., Any]


class AutoOrNumber(click.ParamType):  # type: ignore[type-arg]
    """ "auto", which is what leaving the option out means, or a number."""

    name = "auto|number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, float):
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"expected auto or a number, got {value!r}", param, ctx)


AUTO = AutoOrNumber()


class _RepairKind(click.Choice):  # type: ignore[type-arg]
    """Its value may be left out, so what stands behind the option is taken for it: MODEL too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.choices:
            kinds = ", ".join(self.choices)
            self.fail(f"expected {kinds} or nothing, got {value!r}. If that is MODEL, write it first, or --repair=both.", param, ctx)
        return super().convert(value, param, ctx)


def _output(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Required, but where nothing is written: what was given on the command line has been read before what was not."""
    if value is None and not ctx.params.get("plan") and not ctx.resilient_parsing:
        raise click.MissingParameter(ctx=ctx, param=param)
    return value


# Options that belong to a method: its dataclass has a field of the same name. None means "the method's default".
METHOD_OPTIONS = (
    click.option("--recipe", type=click.Choice(["auto", "paper"]), help="proxsparse: nothing to tune, or as published. Default: auto."),
    click.option("--loss", type=click.Choice(["kl", "ce"]), help="proxsparse: divergence from the dense model, or cross-entropy."),
    click.option(
        "--forward",
        type=click.Choice(["masked", "learned"]),
        help="proxsparse: the loss sees the original weights under the current mask, or the learned weights.",
    ),
    click.option("--prox-scale", type=click.Choice(["activations", "none"]), help="proxsparse: what prox and mask measure weights by."),
    click.option("--train", type=click.Choice(["pruned", "all"]), help="proxsparse: only the layers to prune learn, or all parameters."),
    click.option("--temperature", type=float, help="proxsparse: of --loss kl. Default: 1."),
    click.option("--layer-weight", type=float, help="proxsparse: of the hidden states' errors in --loss kl. Default: 1; 0: logits only."),
    click.option(
        "--lambda1", type=AUTO, metavar="auto|X", help="proxsparse: strength of the 2:4 regulariser. Default: from scale and steps."
    ),
    click.option("--lambda2", type=float, help="proxsparse: strength of the frozen-weight penalty. Default: 0, off."),
    click.option("--frozen-eps", type=float, help="proxsparse: eps of the frozen-weight penalty. Default: 0.1."),
    click.option("--lr", type=AUTO, metavar="auto|X", help="proxsparse: peak learning rate. Default: from weight scale and steps."),
    click.option("--batch-size", type=int, help="proxsparse: windows per step. Default: 1."),
    click.option("--epochs", type=int, help="proxsparse: passes over the windows. Default: as make 800 windows, at most 4; paper: 1."),
    click.option("--steps", type=int, help="proxsparse: optimiser steps, with as many passes as that takes; instead of --epochs."),
    click.option("--weight-bits", type=int, help="proxsparse: 16, 24 or 32 bits kept of bf16 weights. Default: by model size."),
    click.option(
        "--moments",
        type=click.Choice(["float32", "bfloat16", "int8"]),
        help="proxsparse: storage of AdamW's moments of the pruned weights. Default: by model size.",
    ),
    click.option(
        "--clip-mode",
        type=click.Choice(["total", "loss", "none"]),
        help="proxsparse: clip the total gradient, the loss gradient, or none, which frees gradients early. Default: total.",
    ),
    click.option(
        "--checkpointing/--no-checkpointing",
        default=None,
        help="proxsparse: recompute activations in the backward pass. Default: where a step does not fit otherwise.",
    ),
    click.option(
        "--cuda-graph/--no-cuda-graph",
        default=None,
        help="proxsparse: replay forward and backward pass as a CUDA graph. Default: where a step takes less than half of the GPU.",
    ),
    click.option("--dampening", type=float, help="sparsegpt: share of the mean Hessian diagonal added to it. Default: 0.01."),
    click.option("--mask-only", is_flag=True, default=None, help="sparsegpt: its mask on the original weights, none updated."),
)
METHOD_FIELDS = (
    *("recipe", "loss", "forward", "prox_scale", "train", "temperature", "layer_weight"),
    *("lambda1", "lambda2", "frozen_eps", "lr", "batch_size", "epochs", "steps", "weight_bits", "moments", "clip_mode", "checkpointing"),
    "cuda_graph",
    *("dampening", "mask_only"),
)

BOS_OPTION = click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="A BOS in front of every window, counted in --seqlen: where the tokenizer puts one before a text, always, or never.",
)

RUN_OPTIONS = (
    click.option("-o", "--output", callback=_output, metavar="RUN", help="Folder to write; must not exist, or be empty.  [required]"),
    click.option(
        "--calibration", metavar="SRC", help="c4, wikitext2, stdlib, a Hub dataset, a file or folder. [default: c4; demo: stdlib]"
    ),
    click.option("--eval", "evaluation", metavar="SRC", help="Text to measure on. [default: the held-out side of --calibration]"),
    click.option("--samples", type=int, default=400, show_default=True, help="Calibration windows."),
    click.option("--seqlen", type=int, help="Tokens of a window. [default: the model's limit, at most 4096]"),
    click.option("--eval-windows", type=int, default=128, show_default=True, help="Windows to measure on."),
    click.option(
        "--windows",
        type=click.Choice(["packed", "documents"]),
        default="packed",
        show_default=True,
        help="Documents packed to full windows, or one truncated document a window (the authors' way).",
    ),
    BOS_OPTION,
    click.option("--text-field", metavar="NAME", help="Field of the rows of --calibration with the text. [default: text, else messages]"),
    click.option("--split", metavar="NAME", help="Split of --calibration, a Hub dataset. [default: train]"),
    click.option("--eval-text-field", metavar="NAME", help="As --text-field, of the rows of --eval."),
    click.option("--eval-split", metavar="NAME", help="As --split, of --eval; one document in ten of it is measured on."),
    click.option("--seed", type=int, default=42, show_default=True),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is a GPU]"),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True, help="Of learning."),
    click.option("--include", multiple=True, metavar="REGEX", help="Only layers whose name matches. May be repeated."),
    click.option("--skip", multiple=True, metavar="REGEX", help="Leave out layers whose name matches. May be repeated."),
    click.option(
        "--repair",
        type=_RepairKind(["both", "least-squares", "finetune"]),
        is_flag=False,
        flag_value="both",
        help="Once the mask is fixed, change the kept weights to lose less: least squares by layer, masked fine-tuning, or (alone) both.",
    ),
    click.option("--repair-steps", type=int, metavar="N", help="Steps of fine-tuning. [default: the auto recipe's passes]"),
    click.option(
        "--restore-windows",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Measure on N windows what each layer costs: perplexity with it dense again.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an earlier run of pst at RUN (never anything else)."),
    click.option("--revision", metavar="COMMIT", help="Branch, tag or commit of a Hub model."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the table."),
)


def with_options(options: tuple[Command, ...]) -> Command:
    """Decorator that adds `options` in order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def method_settings(options: dict[str, Any]) -> dict[str, object]:
    """Takes the method's options out of `options`; those not given are left out."""
    taken = {name: options.pop(name) for name in METHOD_FIELDS if name in options}
    return {name: value for name, value in taken.items() if value is not None and (value != "auto" or name == "recipe")}


def output_path(text: str) -> Path:
    """What -o names, as MODEL and text are named: `~` is the home folder."""
    from ..errors import OutputError

    if not text:
        raise OutputError("output folder: expected a name, got an empty one. Is a variable of the shell unset?")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise OutputError(f"output folder: expected a home folder that is known, got {text}. Write the path out.") from error


def run_config(model: str, options: dict[str, Any], **more: Any) -> RunConfig:
    """The RunConfig of the shared options."""
    from ..pipeline import RunConfig

    calibration, output = options.pop("calibration"), options.pop("output")
    if calibration is None:
        calibration = "stdlib" if model == "demo" else "c4"
    return RunConfig(
        model=model,
        output=output_path("." if output is None else output),  # a plan has none, and writes nothing
        calibration=calibration,
        evaluation_windows=options.pop("eval_windows"),
        command=shlex.join(["pst", *sys.argv[1:]]),
        **options,
        **more,
    )
