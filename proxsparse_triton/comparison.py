"""Several methods on the same text: one run folder each, one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .errors import ConfigError
from .evaluation.perplexity import finite
from .formats.folder import FILES, MANIFEST_NAME, check_output, output_folder
from .formats.manifest import DECODER, write_manifest
from .formats.masks import load_masks
from .formats.records import record_of
from .methods.base import build_method
from .methods.magnitude import magnitude_mask
from .models.loading import load_model
from .models.selection import LayerPlan
from .pipeline import Inputs, RunConfig, RunRecord, prepare, run_method
from .progress import SILENT, Progress
from .report import write_report
from .sparsity import BLOCK


@dataclass(frozen=True)
class Row:
    """One method of the table; share of blocks whose mask is the one magnitude would choose, 0 to 1."""

    record: RunRecord
    magnitude_agreement: float


@dataclass(frozen=True)
class Comparison:
    inputs: Inputs
    rows: tuple[Row, ...]


def compare(
    config: RunConfig, methods: Sequence[str], settings: Mapping[str, Mapping[str, object]], progress: Progress = SILENT
) -> Comparison:
    """Runs `methods` with their `settings` on the same windows into `config.output`/<method>.

    The folder also gets report.html, the page of `pst report`.

    Raises: any ProxSparseError; the folder appears only when every method has finished. Until the next comparison those that had are in
    <output>.partial/<method>, and the one that failed left what it had in <output>.partial/<method>.partial.
    """
    check_output(config.output, overwrite=config.overwrite)
    if not methods or len(set(methods)) != len(methods):
        raise ConfigError(f"compare: expected at least one method, each once, got {', '.join(methods) or 'none'}. Check --methods.")
    built = {name: build_method(name, settings.get(name, {})) for name in methods}
    model, inputs = prepare(config, list(built.values()), progress)
    magnitude = _magnitude_masks(model, inputs.plan)
    models = [model]
    del model

    def take_model() -> nn.Module:
        """The model that `prepare` loaded the first time, a fresh one afterwards."""
        if models:
            return models.pop()
        fresh: nn.Module = load_model(
            inputs.source, dtype=config.torch_dtype, device=config.place, trust_remote_code=config.trust_remote_code
        )
        return fresh

    rows = []
    kept = [*methods, *(f"{name}.partial" for name in methods)]
    with output_folder(config.output, overwrite=config.overwrite, keep_on_error=kept) as out:
        for name, method in built.items():
            run = dataclasses.replace(config, method=name, output=out / name, settings=settings.get(name, {}))
            record = run_method(run, method, take_model, inputs, progress)
            # The folder as it will be called once the comparison is complete.
            record = dataclasses.replace(record, folder=config.output / name)
            rows.append(Row(record, agreement(load_masks(out / name), magnitude)))
        write_manifest(
            out,
            {
                "comparison": [_entry(row) for row in rows],
                FILES: {f"{name}/{MANIFEST_NAME}": record_of(out / name / MANIFEST_NAME) for name in built},
                "perplexity": {"dense": finite(inputs.dense_perplexity)},
                DECODER: inputs.plan.share().as_json(),
            },
        )
    try:
        write_report([config.output], config.output / "report.html")  # a page that fails must not take the runs with it
    except BaseException as error:
        error.add_note(f"The runs are complete in {config.output}; only their page is missing, which `pst report` writes.")
        raise
    return Comparison(inputs, tuple(rows))


def agreement(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Share of blocks, over all layers, that two sets of masks decide alike."""
    same = total = 0
    for name, mask in masks.items():
        equal = (mask == others[name]).unflatten(-1, (-1, BLOCK)).all(-1)
        same, total = same + int(equal.sum()), total + equal.numel()
    return same / total


def _magnitude_masks(model: nn.Module, plan: LayerPlan) -> dict[str, Tensor]:
    return {f"{name}.weight": magnitude_mask(model.get_parameter(f"{name}.weight")) for name in plan.selected()}


def _entry(row: Row) -> dict[str, object]:
    record = row.record
    return {
        "method": record.method,
        "folder": record.folder.name,
        "perplexity": finite(record.perplexity),
        "seconds": round(record.seconds, 3),
        "peak_memory_bytes": record.peak_memory,
        "magnitude_agreement": row.magnitude_agreement,
        **{key: value for key, value in record.summary.items() if key != "settings"},
    }
