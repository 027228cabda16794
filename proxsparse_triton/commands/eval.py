"""`pst eval`: perplexity and benchmark tasks of a model, and what it keeps of the dense one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..progress import Progress
from .eval_table import print_report
from .options import BOS_OPTION

if TYPE_CHECKING:
    from ..calibration.sources import Column
    from ..calibration.tokens import Bos
    from ..calibration.windows import Windows
    from ..evaluation.harness import TaskResults, TaskScore, TaskSuite
    from ..models.loading import ModelSource

DEFAULT_SEQLEN = 2048  # the papers' older protocol; 4096 on request


@dataclass(frozen=True)
class _Settings:
    """The options of the command, as click delivers them."""

    path: str
    perplexity: tuple[str, ...]
    tasks: str | None
    dense: str | None
    no_dense: bool
    seqlen: int | None
    windows: int | None
    bos: Bos
    text_field: str | None
    split: str | None
    batch_size: int
    device: str | None
    dtype: str | None
    limit: int | None
    as_json: bool
    trust_remote_code: bool

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


@dataclass(frozen=True)
class _Figures:
    """What was measured on one model: one perplexity for each text, and the tasks."""

    model: str
    device: str
    dtype: str
    perplexities: tuple[float, ...]
    tasks: TaskResults | None


class _Notes(Progress):
    """Notes without bars: lm-eval draws its own, and two displays on one terminal garble each other."""

    def note(self, message: str) -> None:
        click.echo(message, err=True)


@click.command("eval")
@click.argument("path")
@click.option(
    "--perplexity", metavar="SRC", multiple=True, help="Text: wikitext2, c4, stdlib, a Hub dataset, a file or folder. May be repeated."
)
@click.option("--tasks", metavar="A,B,C", help="lm-eval task names or task files (.yaml); `paper`: the seven zero-shot tasks.")
@click.option("--dense", metavar="MODEL", help="Measure this model too and show the recovery. Default: the original of a run of ours.")
@click.option("--no-dense", is_flag=True, help="Do not measure the original.")
@click.option("--seqlen", type=click.IntRange(min=2), help=f"Tokens of a window. Default: the model's limit, at most {DEFAULT_SEQLEN}.")
@click.option("--windows", type=click.IntRange(min=1), help="Number of windows. Default: all; 256 of c4 and Hub datasets.")
@BOS_OPTION
@click.option("--text-field", metavar="NAME", help="Field of your own or a Hub dataset's rows with the text. Default: text, else messages.")
@click.option("--split", metavar="NAME", help="Split of a Hub dataset; one document in ten of it is measured on. Default: train.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Windows or answers per forward pass.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is a GPU.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: float32 on the CPU, as stored on a GPU.")
@click.option("--limit", type=click.IntRange(min=1), help="First N documents of every task: for a try, not for a report.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def evaluate(**options: Any) -> None:
    """Measure the model at PATH (a folder, a Hub id, or `demo`); a packed folder is run packed.

    For a run of `pst prune` the dense original is measured too, on the same windows and tasks, and the table shows the recovery: what
    the pruned model keeps, in per cent (100 is as good as dense).

    Perplexity: exp of the mean token cross-entropy inside non-overlapping windows. wikitext2 is its test set joined by empty lines, as
    in the papers (windows of 2048 or 4096 tokens, all of them); of c4, stdlib and Hub datasets the held-out side is used; your own
    files are used whole. Where the tokenizer puts a BOS before a text, every window gets one; the papers' wikitext2 has it before the
    first window alone, which is --bos never. The table says which it was.
    """
    settings = _Settings(**options)
    _check_usage(settings)

    from ..calibration.windows import check_ids
    from ..evaluation.harness import load_tasks
    from ..evaluation.text import windows_to_measure
    from ..formats.pruned import damage
    from ..formats.verify import recorded_share
    from ..models.loading import load_tokenizer, vocabulary_size
    from .console import console_progress

    place = _place(settings.device)
    notes = _Notes()
    source = _source(settings.path)
    share = recorded_share(source.folder)
    dense = _dense_source(settings, source, notes)
    seqlen = _seqlen(settings, [source] if dense is None else [source, dense])
    tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code, progress=notes)
    if dense is not None:
        _check_same_tokenizer(settings, tokenizer, dense)
    with console_progress() as progress:
        measured_on = partial(windows_to_measure, tokenizer=tokenizer, windows=settings.windows, seqlen=seqlen, bos=settings.bos)
        texts = [measured_on(spec, column=_column(settings, spec), progress=progress) for spec in settings.perplexity]
    for model in filter(None, (source, dense)):
        rows = vocabulary_size(_config(model, settings.trust_remote_code))
        for text in texts:
            check_ids(text, rows, tokenizer)
    # Before the weights: a mistyped task or a missing network costs seconds instead of minutes.
    suite = load_tasks(settings.task_names, progress=notes) if settings.task_names else None

    for problem in damage(source.folder):
        notes.note(f"{source.spec} is not as it was written, and the figures are those of what lies there now. {problem}.")
    measured = _measure(settings, source, tokenizer, texts=texts, suite=suite, place=place)
    original = None if dense is None else _measure(settings, dense, tokenizer, texts=texts, suite=suite, place=place)
    report = {**_report(texts, measured, original), "decoder": None if share is None else share.as_json()}
    if settings.as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print_report(report, "" if share is None else f"Pruned to 2:4 is {share}.")
        if share is not None and share.warning:
            click.echo(share.warning)


def _check_usage(settings: _Settings) -> None:
    if not settings.perplexity and settings.tasks is None:
        raise click.UsageError("nothing to measure: give --perplexity SRC, --tasks A,B,C, or both.")
    if settings.tasks is not None and not settings.task_names:
        raise click.UsageError("--tasks needs at least one name, for example --tasks arc_easy,boolq or --tasks paper.")
    if settings.dense is not None and settings.no_dense:
        raise click.UsageError("--dense and --no-dense contradict each other.")
    for option, value, needed in (
        ("--seqlen", settings.seqlen, settings.perplexity),
        ("--windows", settings.windows, settings.perplexity),
        ("--text-field", settings.text_field, settings.perplexity),
        ("--split", settings.split, settings.perplexity),
        ("--limit", settings.limit, settings.tasks),
    ):
        if value is not None and not needed:
            raise click.UsageError(f"{option} has no effect without {'--tasks' if option == '--limit' else '--perplexity'}.")


def _column(settings: _Settings, spec: str) -> Column:
    """Of several texts --text-field is that of those with rows; where none has rows it is refused when they are opened."""
    from ..calibration.sources import Column, has_rows

    field = settings.text_field
    if field is not None and not has_rows(spec) and any(map(has_rows, settings.perplexity)):
        field = None
    return Column(field, settings.split)


def _place(device: str | None) -> str:
    """The device to run on, checked before anything is read."""
    import torch

    from ..errors import BackendError

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise BackendError("eval: expected a CUDA GPU for --device cuda, got none. Use --device cpu, or install torch with CUDA.")
    return device or ("cuda" if available else "cpu")


def _source(path: str) -> ModelSource:
    """What to measure: a model as `resolve_model` finds it, or a packed folder, which runs packed."""
    from pathlib import Path

    from ..formats.packed import is_packed_folder, read_packed
    from ..models.loading import ModelSource, resolve_model

    if not is_packed_folder(Path(path)):
        return resolve_model(path)
    packed = read_packed(path, verify_hashes=False)  # its loading compares the hashes
    return ModelSource(path, packed.folder, None, packed.weight_files)


def _dense_source(settings: _Settings, source: ModelSource, notes: Progress) -> ModelSource | None:
    """The model to compare with: --dense, or the original that a run of ours names, if it is still there."""
    from ..errors import ProxSparseError
    from ..formats.manifest import original_of, read_manifest
    from ..models.loading import resolve_model

    if settings.dense is not None:
        return resolve_model(settings.dense)
    if settings.no_dense or not (source.folder / "manifest.json").is_file():
        return None
    try:
        spec, revision = original_of(read_manifest(source.folder))
        return None if spec is None else resolve_model(spec, revision=revision)
    except ProxSparseError as error:
        notes.note(f"The dense original is not measured: {error} Name it with --dense, or silence this with --no-dense.")
        return None


def _seqlen(settings: _Settings, sources: Sequence[ModelSource]) -> int:
    """The window length, checked against the models' limits before their weights are read."""
    from ..errors import ConfigError
    from ..models.loading import max_seqlen

    limits: dict[str, int] = {}
    for source in sources:
        config = _config(source, settings.trust_remote_code)
        limit = None if config is None else max_seqlen(config)
        if limit is not None:
            limits[source.spec] = limit
    if settings.seqlen is None:
        return min([DEFAULT_SEQLEN, *limits.values()])
    for spec, limit in limits.items():
        if settings.seqlen > limit:
            raise ConfigError(
                f"eval: expected --seqlen of at most {limit}, the limit of {spec}, got {settings.seqlen}. Lower it or leave it out."
            )
    return settings.seqlen


def _config(source: ModelSource, trust_remote_code: bool) -> Any:
    """The model's configuration object, None if it does not load: load_model then says why."""
    from ..errors import ProxSparseError
    from ..models.loading import load_config

    try:
        return load_config(source, trust_remote_code=trust_remote_code)
    except ProxSparseError:  # custom code, an unknown model type, a broken file
        return None


def _check_same_tokenizer(settings: _Settings, tokenizer: Any, dense: ModelSource) -> None:
    """Both models read the same token ids, so these must mean the same text to both."""
    from ..errors import ConfigError
    from ..models.loading import load_tokenizer

    other = load_tokenizer(dense, trust_remote_code=settings.trust_remote_code)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"eval: expected one tokenizer for {settings.path} and {dense.spec}, got two with different vocabularies "
            f"({len(tokenizer)} and {len(other)} tokens). Name the original with --dense, or use --no-dense."
        )


def _measure(
    settings: _Settings, source: ModelSource, tokenizer: Any, *, texts: Sequence[Windows], suite: TaskSuite | None, place: str
) -> _Figures:
    """Load one model, measure everything on it, and let it go: two models never share the memory."""
    import gc

    import torch

    from ..evaluation.harness import run_tasks
    from ..evaluation.perplexity import perplexity
    from ..export import load_packed
    from ..formats.packed import is_packed_folder
    from ..models.loading import load_model
    from .console import console_progress

    dtype = getattr(torch, settings.dtype) if settings.dtype else torch.float32 if place == "cpu" else None
    notes = _Notes()
    notes.note(f"Loading {source.spec}.")
    gc.collect()
    if is_packed_folder(source.folder):
        model = load_packed(source.folder, dtype=dtype, device=place, trust_remote_code=settings.trust_remote_code)
    else:
        model = load_model(source, dtype=dtype, device=place, trust_remote_code=settings.trust_remote_code)
    with console_progress() as progress:
        found = tuple(perplexity(model, text.tokens, batch_size=settings.batch_size, progress=progress) for text in texts)
    tasks = None
    if suite is not None:
        tasks = run_tasks(model, tokenizer, suite, batch_size=settings.batch_size, limit=settings.limit, progress=notes)
    return _Figures(source.spec, place, str(model.dtype).removeprefix("torch."), found, tasks)


def _report(texts: Sequence[Windows], measured: _Figures, dense: _Figures | None) -> dict[str, Any]:
    """Everything measured as plain JSON: what --json prints and the table shows."""
    from ..evaluation.harness import percent

    perplexities = []
    for index, text in enumerate(texts):
        entry: dict[str, Any] = {"corpus": text.source, "seqlen": text.seqlen, "windows": len(text.tokens), "fingerprint": text.fingerprint}
        entry |= {"bos": list(text.bos), "protocol": text.protocol or None}
        entry["perplexity"] = _finite(measured.perplexities[index])
        if dense is not None:
            entry["dense"] = _finite(dense.perplexities[index])
            entry["recovery"] = percent(dense.perplexities[index], measured.perplexities[index], higher_is_better=False)
        perplexities.append(entry)
    return {
        "model": measured.model,
        "dense": None if dense is None else dense.model,
        "device": measured.device,
        "dtype": measured.dtype,
        "perplexity": perplexities,
        "tasks": None if measured.tasks is None else _task_report(measured.tasks, None if dense is None else dense.tasks),
    }


def _task_report(measured: TaskResults, dense: TaskResults | None) -> dict[str, Any]:
    from ..evaluation.harness import recovery

    kept = {} if dense is None else recovery(dense, measured)
    entries = []
    for index, score in enumerate(measured.scores):
        entry: dict[str, Any] = {"task": score.task, "metric": score.metric, "samples": score.samples, **_score_report(score)}
        if dense is not None:
            entry |= {"dense": _score_report(dense.scores[index]), "recovery": kept[score.task]}
        entries.append(entry)
    report: dict[str, Any] = {"num_fewshot": measured.num_fewshot, "limit": measured.limit, "scores": entries, "mean": measured.mean}
    if dense is not None:
        report |= {"dense_mean": dense.mean, "recovery": kept["mean"]}
    return report


def _score_report(score: TaskScore) -> dict[str, Any]:
    return {
        "score": _finite(score.score),
        "metrics": {name: _finite(value) for name, value in score.metrics.items()},
        "stderr": {name: _finite(value) for name, value in score.stderr.items()},
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
