"""The table of `pst eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def print_report(report: Mapping[str, Any], share: str = "") -> None:
    """The report as one table on stdout. share: a sentence on what is 2:4, empty where nothing is known."""
    from .console import print_table

    compared = report["dense"] is not None
    rows = [_perplexity_row(entry) for entry in report["perplexity"]]
    tasks = report["tasks"]
    if tasks is not None:
        rows += [row for entry in tasks["scores"] for row in _task_rows(entry)]
        if tasks["mean"] is not None and len(tasks["scores"]) > 1:
            name = f"mean of {len(tasks['scores'])} tasks, acc"
            rows.append((name, _number(tasks.get("dense_mean"), 4), _number(tasks["mean"], 4), _per_cent(tasks.get("recovery"))))
    remarks = [share] if share else []
    if report["perplexity"]:
        remarks.append("Perplexity: lower is better.")
    remarks += [f"{entry['corpus']}: {entry['protocol']}." for entry in report["perplexity"] if entry["protocol"]]
    if tasks is not None:
        some = f"the first {tasks['limit']} documents of each" if tasks["limit"] else "all documents"
        remarks.append(f"Tasks: lm-eval, {tasks['num_fewshot']}-shot, {some}.")
    if compared:
        remarks.append("Recovery: 100 % is as good as dense (perplexity: dense / pruned, accuracy: pruned / dense).")
    title = f"{report['model']} ({report['dtype']}, {report['device']})" + (f" against {report['dense']}" if compared else "")
    columns = ("measure", "dense", "pruned", "recovery") if compared else ("measure", "value")
    shown = rows if compared else [(name, value) for name, _, value, _ in rows]
    print_table(title, columns, shown, note=" ".join(remarks))


def _perplexity_row(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    in_front = ", each behind a BOS" if entry["bos"] else ""
    name = f"perplexity, {entry['corpus']}, {entry['windows']} windows of {entry['seqlen']}{in_front}"
    return name, _number(entry.get("dense"), 3), _number(entry["perplexity"], 3), _per_cent(entry.get("recovery"))


def _task_rows(entry: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """One row for the metric that stands for the task, and one for acc_norm where the task has it."""
    from ..evaluation.harness import percent

    def shown(side: Mapping[str, Any] | None, metric: str) -> str:
        if side is None:
            return ""
        error = side["stderr"].get(metric)
        return _number(side["metrics"][metric], 4) + ("" if error is None else f" ± {error:.4f}")

    dense = entry.get("dense")
    rows = [
        (
            f"{entry['task']}, {entry['metric']}",
            shown(dense, entry["metric"]),
            shown(entry, entry["metric"]),
            _per_cent(entry.get("recovery")),
        )
    ]
    if "acc_norm" in entry["metrics"] and entry["metric"] != "acc_norm":
        kept = None if dense is None else percent(dense["metrics"]["acc_norm"], entry["metrics"]["acc_norm"])
        rows.append((f"{entry['task']}, acc_norm", shown(dense, "acc_norm"), shown(entry, "acc_norm"), _per_cent(kept)))
    return rows


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
