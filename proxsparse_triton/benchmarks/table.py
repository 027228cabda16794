"""Rows of measurements: what they carry, how they are shown, how they are kept as CSV."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import OutputError
from ..formats.folder import atomic_file
from ..formats.manifest import versions

Row = dict[str, object]


def environment(device: torch.device, commit: str | None = None) -> Row:
    """What a figure depends on: gpu, versions, commit, date. `commit`: where there is no git checkout to ask."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({platform.processor() or platform.machine()})"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"gpu": gpu, "cusparselt": cusparselt_version(), **versions(), "commit": commit or git_commit(), "date": date}


def cusparselt_version() -> str:
    """As torch finds it: 800 is 0.8.0."""
    number = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    return "none" if number is None else f"{number // 1000}.{number // 100 % 10}.{number % 100}"


def git_commit() -> str:
    """HEAD of the checkout this package is run from, "-dirty" with changes in it; "unknown" when installed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV file that `append_csv` wrote; none where there is no file yet.

    Raises: OutputError: another file.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[Row] = [dict(row) for row in reader]
            columns = reader.fieldnames or ()
    except (OSError, ValueError, csv.Error) as error:
        raise OutputError(f"bench: expected a CSV file to add rows to, got {path}: {error}. Choose another name with -o.") from error
    if "bench" not in columns or any(None in row for row in rows):
        raise OutputError(f"bench: expected a CSV file of an earlier bench, got {path}. Choose another name with -o.")
    return rows


def append_csv(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV file, or starts one; new columns go to the end.

    Raises: OutputError: the file cannot be written, or is another file.
    """
    rows = [*read_csv(path), *rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_file(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows([{key: _rounded(value) for key, value in row.items()} for row in rows])


def _rounded(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times(value: float) -> str:
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value:,.0f}"


# What a column is called for people, and how its values are shown; every other column is shown as it is.
SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "us": ("us", lambda value: f"{value:,.1f}"),
    "us_20": ("20 %", lambda value: f"{value:,.1f}"),
    "us_80": ("80 %", lambda value: f"{value:,.1f}"),
    "ms": ("ms", lambda value: f"{value:,.1f}"),
    "ms_20": ("20 %", lambda value: f"{value:,.1f}"),
    "ms_80": ("80 %", lambda value: f"{value:,.1f}"),
    "bytes_per_weight": ("bytes/weight", lambda value: f"{value:g}"),
    "gb_per_s": ("GB/s", lambda value: f"{value:,.0f}"),
    "roof_gb_per_s": ("copy GB/s", lambda value: f"{value:,.0f}"),
    "of_roof": ("of copy", _share),
    "scratch_bytes": ("scratch", _bytes),
    "worse_blocks": ("blocks solved worse", lambda value: f"{value:.2%}"),
    "times_ours": ("time / ours", _times),
    "to_adamw": ("time / AdamW", lambda value: f"{value:.3f}"),
    "tokens_per_s": ("tokens/s", lambda value: f"{value:,.0f}"),
    "mfu": ("MFU", _share),
    "matmul_tflops": ("matmul TFLOP/s", lambda value: f"{value:,.0f}"),
    "optimizer_share": ("optimiser", _share),
    "optimizer_ms": ("optimiser ms", lambda value: f"{value:,.1f}"),
    "peak_bytes": ("peak", _bytes),
    "predicted_bytes": ("predicted", _bytes),
    "predicted_ms": ("predicted ms", lambda value: f"{value:,.1f}"),
    "minutes_400_steps": ("400 steps, min", lambda value: f"{value:.2f}"),
    "to_plain": ("time / plain", lambda value: f"{value:.3f}"),
    "speed_up": ("speed-up", lambda value: f"{value:.3f}x"),
    "dense_us": ("dense us", lambda value: f"{value:,.1f}"),
    "kernel_until": ("kernel, up to tokens", lambda value: f"{value:,}"),
    "library_from": ("library, from tokens", lambda value: f"{value:,}"),
    "lowest": ("lowest SparseLinear", lambda value: f"{value:.3f}x"),
    "lowest_at": ("at tokens", lambda value: f"{value:,}"),
    "weight_gb": ("model GB", lambda value: f"{value:.2f}"),
    "layers_gb": ("layers GB", lambda value: f"{value:.2f}"),
    "layers_ratio": ("of dense", lambda value: f"{value:.4f}"),
    "logits_error": ("logits differ", lambda value: f"{value:.2%}"),
    "ttft_ms": ("first token ms", lambda value: f"{value:,.2f}"),
    "ttft_graph_ms": ("in a graph", lambda value: f"{value:,.2f}"),
    "ttft_speed_up": ("first token speed-up", lambda value: f"{value:.3f}x"),
    "ms_per_step": ("ms/step", lambda value: f"{value:,.3f}"),
}
# In the CSV only, and in the note below the table.
HIDDEN = ("bench", "samples", "gpu", "cusparselt", "python", "torch", "triton", "transformers", "safetensors", "commit", "date")


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(column titles, text of every row) for people: columns without any value are left out."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
    keys = [key for key in keys if any(row.get(key) not in (None, "") for row in rows)]
    titles = [SHOWN[key][0] if key in SHOWN else key.replace("_", " ") for key in keys]
    return titles, [[_cell(key, row.get(key)) for key in keys] for row in rows]


def _cell(key: str, value: object) -> str:
    if value is None:
        return ""
    return SHOWN[key][1](value) if key in SHOWN and isinstance(value, int | float) else str(value)


def described(facts: Row) -> str:
    """The environment in one line, below a table."""
    return ", ".join(
        [
            f"GPU {facts['gpu']}",
            *[f"{name} {facts[name]}" for name in ("torch", "triton", "transformers")],
            f"cuSPARSELt {facts['cusparselt']}",
            f"commit {facts['commit']}",
            str(facts["date"]),
        ]
    )
