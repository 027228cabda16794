"""One run: config -> calibrate -> learn -> mask -> write -> evaluate, in a folder that appears when it is complete."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .calibration.chat import chat_of
from .calibration.sources import Column, TextSource, is_local, open_source
from .calibration.tokens import Bos
from .calibration.windows import Windows, calibration_windows, check_ids, evaluation_windows
from .errors import ConfigError, DataError, ShortTextError
from .evaluation.memory import explain_out_of_memory, peak_memory, reset_peak_memory
from .evaluation.perplexity import embedding_rows, finite, perplexity
from .evaluation.restore import restore_test
from .formats.dense import check_parameters, check_small_files, write_pruned_model
from .formats.folder import FILES, check_apart, check_output, check_space, output_folder
from .formats.manifest import DECODER, write_manifest
from .formats.masks import save_masks
from .formats.records import file_records
from .formats.shards import MASKS_NAME
from .methods.base import Method, PruneResult, PruneTask, build_method
from .methods.repair import Repair
from .models.finite import check_finite
from .models.loading import ModelSource, file_hashes, load_config, load_model, load_tokenizer, max_seqlen, resolve_model, vocabulary_size
from .models.reading import unread
from .models.selection import UNREAD, LayerPlan, plan_layers
from .models.share import NOTHING, Share
from .progress import SILENT, Once, Progress

METRICS = "metrics.jsonl"
LOOKED_AT = 128  # windows, before a layer that none of them reads is left dense
DEFAULT_SEQLEN = 4096  # the paper's context, or the model's limit where that is less
EVALUATION_WINDOWS = 128


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; all of it goes into the manifest."""

    model: str
    output: Path
    method: str = "proxsparse"
    settings: Mapping[str, object] = field(default_factory=dict)  # of the method; None means its default
    calibration: str = "c4"
    evaluation: str | None = None  # None: the held-out side of the calibration text
    samples: int = 400
    seqlen: int | None = None
    evaluation_windows: int = EVALUATION_WINDOWS
    windows: Literal["packed", "documents"] = "packed"
    bos: Bos = "auto"  # in front of every window, of calibration and of evaluation
    text_field: str | None = None  # of the calibration text, and of the evaluation text where that is its held-out side
    split: str | None = None  # of a Hub dataset; None: train
    eval_text_field: str | None = None  # of `evaluation`
    eval_split: str | None = None
    seed: int = 42
    device: str | None = None
    dtype: str = "float32"
    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    overwrite: bool = False
    repair: str | None = None  # of the kept weights, once the mask is fixed: both, least-squares or finetune
    repair_steps: int | None = None
    restore_windows: int = 0  # of evaluation windows for the test that restores one layer at a time; 0: none
    command: str | None = None  # the command line, for the record
    gpu_memory: float | None = None  # GB that learning keeps within, by activation checkpointing; None: all of the GPU
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for option, value, least in (("samples", self.samples, 1), ("eval-windows", self.evaluation_windows, 1), ("seed", self.seed, 0)):
            if value < least:
                raise ConfigError(f"prune: expected --{option} of at least {least}, got {value}. Choose another value.")
        if self.restore_windows < 0:
            raise ConfigError(f"prune: expected --restore-windows of at least 0, got {self.restore_windows}. Leave it out for no test.")
        if self.seqlen is not None and self.seqlen < 2:
            raise ConfigError(f"prune: expected --seqlen of at least 2, got {self.seqlen}. Choose another value.")
        for option, given in (("eval-text-field", self.eval_text_field), ("eval-split", self.eval_split)):
            if given is not None and self.evaluation is None:
                raise ConfigError(f"prune: expected --{option} with --eval, got it alone. Add --eval, or leave it out.")
        if self.gpu_memory is not None and not 0 < self.gpu_memory < math.inf:
            raise ConfigError(f"prune: expected --gpu-memory above 0, got {self.gpu_memory}. Give the GPU's size in GB.")
        if self.repair is None and self.repair_steps is not None:
            raise ConfigError("prune: expected --repair-steps with --repair, got it alone. Add --repair, or leave it out.")
        self.repairing()  # its own checks
        if self.dtype not in ("float32", "bfloat16"):  # fp16 gradients underflow without loss scaling
            raise ConfigError(f"prune: expected --dtype float32 or bfloat16, got {self.dtype!r}. Choose one of these.")

    def repairing(self) -> Repair | None:
        """What repairs the kept weights; None where that was not asked for."""
        return None if self.repair is None else Repair(self.repair, self.repair_steps)  # type: ignore[arg-type]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def memory(self) -> int | None:
        """Bytes to keep within, where that was asked for."""
        return None if self.gpu_memory is None else round(self.gpu_memory * 1e9)

    @property
    def place(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Inputs:
    """What a run works on, the same for every method of a comparison."""

    source: ModelSource
    calibration: Windows | None
    evaluation: Windows | None
    plan: LayerPlan
    dense_perplexity: float | None


@dataclass(frozen=True)
class RunRecord:
    """The figures of a finished run."""

    method: str
    folder: Path
    perplexity: float | None
    dense_perplexity: float | None
    seconds: float  # the method alone: learning, or computing the masks
    peak_memory: int  # bytes: of the GPU where there is one, else of the process
    parameters: tuple[str, ...]
    summary: Mapping[str, object]
    share: Share = NOTHING  # of the decoder's weights
    evaluation: Windows | None = None  # what was measured on

    @property
    def repair(self) -> str | None:
        """How the kept weights were repaired; None where they were not."""
        entry = self.summary.get("repair")
        return str(entry["kind"]) if isinstance(entry, Mapping) else None


def prune(config: RunConfig, progress: Progress = SILENT) -> RunRecord:
    """Prune one model into `config.output`.

    Raises: any ProxSparseError; then nothing is left under the output's name, `<output>.partial/metrics.jsonl` holds the steps that were
    taken, and `<output>.partial/masks.safetensors` the masks where only what comes after them failed.
    """
    check_output(config.output, overwrite=config.overwrite)
    method = build_method(config.method, config.settings)
    model, inputs = prepare(config, [method], progress)
    models = [model]
    del model
    return run_method(config, method, models.pop, inputs, progress)


def prepare(config: RunConfig, methods: Sequence[Method], progress: Progress) -> tuple[nn.Module, Inputs]:
    """Checks everything that can be checked, reads text and model, prints the plan, measures the dense model."""
    source = resolve_model(config.model, revision=config.revision)
    check_apart(config.output, source.folder)
    check_small_files(source.folder, progress)
    check_space(config.output, sum(path.stat().st_size for path in source.weight_files))
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code, progress=progress)
    described = load_config(source, trust_remote_code=config.trust_remote_code)
    seqlen = checked_seqlen(config.seqlen, described)
    needs_text = config.repair is not None or any(method.needs_calibration for method in methods)
    calibration, evaluation = read_text(config, tokenizer, seqlen, needs_text, progress)
    read = [windows for windows in (calibration, evaluation) if windows is not None]
    for windows in read:
        check_ids(windows, vocabulary_size(described), tokenizer)
    model = load_model(source, dtype=config.torch_dtype, device=config.place, trust_remote_code=config.trust_remote_code)
    for windows in read:
        check_ids(windows, embedding_rows(model), tokenizer)
    plan = plan_layers(model, include=config.include, skip=config.skip)
    check_finite("prune", model)
    plan = _without_unread(model, plan, next((text.tokens for text in (calibration, evaluation) if text is not None), ()))
    check_parameters(source.weight_files, {f"{choice.name}.weight": choice.shape for choice in plan.choices if choice.selected})
    for method in methods:
        method.check(plan)
    repair = config.repairing()
    if repair is not None:
        repair.check(plan)
    describe(plan, progress)
    dense = None if evaluation is None else perplexity(model, evaluation.tokens, progress=progress)
    return model, Inputs(source, calibration, evaluation, plan, dense)


def _without_unread(model: nn.Module, plan: LayerPlan, windows: Sequence[Tensor]) -> LayerPlan:
    """The plan without layers of which the text can say nothing, since no forward pass reads them."""
    parameters = {name: model.get_submodule(name).weight for name in plan.selected()}
    unseen = unread(model, cast(dict[str, nn.Parameter], parameters), windows[:LOOKED_AT]) if windows else []
    return plan.without(unseen, UNREAD) if unseen else plan


def checked_seqlen(seqlen: int | None, config: Any) -> int:
    """The window length, within the model's limit. ConfigError beyond it."""
    limit = max_seqlen(config)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit is not None and seqlen > limit:
        raise ConfigError(f"prune: expected --seqlen of at most {limit}, the model's limit, got {seqlen}. Lower it or leave it out.")
    return seqlen


def read_text(
    config: RunConfig, tokenizer: Any, seqlen: int, needs_calibration: bool, progress: Progress
) -> tuple[Windows | None, Windows | None]:
    """Calibration and evaluation windows that share no document.

    Without --eval the text is split: one document in ten is held out, of a single document its last tenth (c4 and wikitext2 bring
    their own split). A text too short for that is used whole and nothing is measured on it; nor is it where a Hub text cannot be had
    and the method needs none.
    """
    evaluation, digests = None, frozenset[str]()
    progress = Once(progress)  # both sides of a text are read, and have the same to say of it
    chat = chat_of(tokenizer)
    column = Column(config.text_field, config.split)
    if config.evaluation is not None:
        other = Column(config.eval_text_field, config.eval_split, "--eval-text-field", "--eval-split")
        text = open_source(config.evaluation, split="all" if is_local(config.evaluation) else "heldout", column=other, chat=chat)
        evaluation, digests = _windows_to_measure(text, config, tokenizer, seqlen, progress)
    else:
        text = open_source(config.calibration, split="heldout", column=column, chat=chat)
        try:
            evaluation, digests = _windows_to_measure(text, config, tokenizer, seqlen, progress)
        except DataError as error:
            if not isinstance(error, ShortTextError) and (needs_calibration or is_local(config.calibration)):
                raise
            progress.note(f"No perplexity is measured; name a text with --eval. The reason: {error}")
    if not needs_calibration:
        return None, evaluation
    whole = is_local(config.calibration) and (config.evaluation is not None or evaluation is None)
    text = open_source(config.calibration, split="all" if whole else "calibration", column=column, chat=chat)
    calibration = calibration_windows(
        text,
        tokenizer,
        samples=config.samples,
        seqlen=seqlen,
        seed=config.seed,
        mode=config.windows,
        bos=config.bos,
        exclude=digests,
        progress=progress,
    )
    return calibration, evaluation


def _windows_to_measure(
    text: TextSource, config: RunConfig, tokenizer: Any, seqlen: int, progress: Progress
) -> tuple[Windows, frozenset[str]]:
    """As many evaluation windows as asked for, or as there are. ShortTextError where there is not one."""
    try:
        return evaluation_windows(text, tokenizer, windows=config.evaluation_windows, seqlen=seqlen, bos=config.bos, progress=progress)
    except ShortTextError:
        found, digests = evaluation_windows(text, tokenizer, windows=None, seqlen=seqlen, bos=config.bos, progress=progress)
        progress.note(f"{text.name}: {len(found.tokens)} windows of {seqlen} tokens to measure on, not {config.evaluation_windows}.")
        return found, digests


def describe(plan: LayerPlan, progress: Progress) -> None:
    """The plan, before work starts: how many layers and which share of the weights are pruned, and why the others are not."""
    chosen = [choice for choice in plan.choices if choice.selected]
    weights, share = sum(choice.shape[0] * choice.shape[1] for choice in chosen), plan.share()
    progress.note(f"pruning {len(chosen)} of {len(plan.choices)} layers in {plan.blocks}: {weights / 1e6:.1f} M weights to 2:4, {share}")
    if share.warning:
        progress.note(share.warning)
    for choice in plan.choices:
        if not choice.selected:
            progress.note(f"  skipped {choice.name} {list(choice.shape)}: {choice.reason}")


def run_method(config: RunConfig, method: Method, take_model: Callable[[], nn.Module], inputs: Inputs, progress: Progress) -> RunRecord:
    """The method, the run folder, and the perplexity of what was written.

    `take_model` hands over the only reference: the model is freed before what was written is loaded, so that one model at a time
    is in memory.
    """
    size = sum(path.stat().st_size for path in inputs.source.weight_files)
    kept, folder = [METRICS, MASKS_NAME], inputs.source.folder
    with output_folder(config.output, overwrite=config.overwrite, keep_on_error=kept, needed=size, source=folder) as out:
        with _metrics(out / METRICS) as record, explain_out_of_memory("prune", f"{config.method} on {config.place}", _ADVICE):
            windows = () if inputs.calibration is None else inputs.calibration.tokens
            task = PruneTask(take_model(), inputs.plan, windows, config.seed, config.memory, progress, record)
            reset_peak_memory(config.place)
            start = time.perf_counter()
            result = method.prune(task)
            del task
            gc.collect()
            save_masks(out / MASKS_NAME, result.masks)
            repair = config.repairing()
            if repair is not None:
                task = PruneTask(_dense(config, inputs), inputs.plan, windows, config.seed, config.memory, progress, record)
                result = repair.like(method).run(task, result)
                del task
                gc.collect()
            seconds = time.perf_counter() - start
            peak = peak_memory(config.place)
        entry = {"method": config.method, "pattern": "2:4", "original": config.model, "weights_updated": result.weights is not None}
        write_pruned_model(inputs.source.folder, inputs.source.weight_files, out, result.masks, weights=result.weights, config_entry=entry)
        pruned, restored = _measure_written(config, out, inputs, list(result.masks), progress)
        record_ = RunRecord(
            config.method,
            config.output,
            pruned,
            inputs.dense_perplexity,
            seconds,
            peak,
            tuple(result.masks),
            {"settings": dataclasses.asdict(method), **result.summary, **restored},  # type: ignore[call-overload]
            inputs.plan.share(result.masks),
            inputs.evaluation,
        )
        used = inputs if method.needs_calibration or config.repair is not None else dataclasses.replace(inputs, calibration=None)
        write_manifest(out, {**_manifest(config, used, result, record_), FILES: file_records(out)})
    return record_


_ADVICE = "Lower --seqlen, --samples or --batch-size, or learn with --dtype bfloat16."


def _dense(config: RunConfig, inputs: Inputs) -> nn.Module:
    model: nn.Module = load_model(inputs.source, dtype=config.torch_dtype, device=config.place, trust_remote_code=config.trust_remote_code)
    return model


def _measure_written(
    config: RunConfig, out: Path, inputs: Inputs, pruned: Sequence[str], progress: Progress
) -> tuple[float | None, dict[str, object]]:
    """Perplexity of the folder as it will be found, in the dtype of the run, and the restore test where it was asked for."""
    if inputs.evaluation is None:
        return None, {}
    tokens = inputs.evaluation.tokens
    written = resolve_model(str(out))
    model = load_model(written, dtype=config.torch_dtype, device=config.place, trust_remote_code=config.trust_remote_code)
    measured = perplexity(model, tokens, progress=progress)
    if not config.restore_windows:
        return measured, {}
    dense = load_model(inputs.source, dtype=config.torch_dtype, device="cpu", trust_remote_code=config.trust_remote_code)
    original = {name: dense.get_parameter(name).detach() for name in pruned}
    few = tokens[: config.restore_windows]
    layers = restore_test(model, original, few, progress)
    return measured, {"restore": layers, "restore_windows": len(few), "restore_pruned": finite(perplexity(model, few))}


def _manifest(config: RunConfig, inputs: Inputs, result: PruneResult, record: RunRecord) -> dict[str, object]:
    return {
        "command": config.command,
        "model": {"spec": config.model, "revision": inputs.source.revision, "files": file_hashes(inputs.source)},
        "config": {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("output", "command")},
        "method": {"name": record.method, **record.summary},
        "device": config.place,
        "parameters": list(record.parameters),
        "weights_updated": result.weights is not None,
        DECODER: record.share.as_json(),
        "skipped": {choice.name: choice.reason for choice in inputs.plan.choices if not choice.selected},
        "calibration": None if inputs.calibration is None else inputs.calibration.record(),
        "evaluation": None if inputs.evaluation is None else inputs.evaluation.record(),
        "perplexity": {"dense": finite(inputs.dense_perplexity), "pruned": finite(record.perplexity)},
        "seconds": round(record.seconds, 3),
        "peak_memory_bytes": record.peak_memory,
    }


@contextmanager
def _metrics(path: Path) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Writes one JSON row a step, at once: what is there survives a crash."""
    with path.open("w", encoding="utf-8", buffering=1) as file:

        def record(row: Mapping[str, object]) -> None:
            file.write(json.dumps(row) + "\n")

        yield record
