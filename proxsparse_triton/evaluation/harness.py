"""Benchmark tasks through lm-eval's own Python API: names it knows, or local task files."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, ConfigError, DataError, ModelError, ProxSparseError
from ..files import read_regular
from ..progress import SILENT, Progress
from .memory import explain_out_of_memory, is_out_of_memory
from .perplexity import CHECK_DTYPE, embedding_rows

if TYPE_CHECKING:
    from torch import nn

# The seven zero-shot tasks of the ProxSparse paper (its columns ARC-C, ARC-E, SIQA, HellaSwag, OBQA, PIQA, TQA), all by `acc`.
PAPER_TASKS = ("arc_challenge", "arc_easy", "social_iqa", "hellaswag", "openbookqa", "piqa", "truthfulqa_mc2")
SEED = 1234  # lm-eval's own default for numpy, torch and few-shot sampling; here for all of them
_FIRST_VERSION = "0.4.12"  # the first lm-eval with TaskManager.load
_MOST_BYTES = 1 << 24  # of a task file
_NOISY = ("lm_eval", "datasets", "huggingface_hub")


@dataclass(frozen=True)
class TaskScore:
    """What lm-eval reports for one task, or for one group with an aggregate of its own.

    `metrics` and `stderr` are keyed by metric name (`acc`, `acc_norm`), fractions as lm-eval gives them; a metric behind a filter
    other than lm-eval's `none` is called `metric,filter`. `metric` is the one that stands for the task: `acc` where there is one,
    else the first.
    """

    task: str
    metric: str
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    higher_is_better: bool
    samples: int

    @property
    def score(self) -> float:
        return self.metrics[self.metric]


@dataclass(frozen=True)
class TaskResults:
    """Scores in the order in which the tasks were asked for. `mean` is over `acc`, None unless every task has one."""

    scores: tuple[TaskScore, ...]
    num_fewshot: int
    limit: int | None

    @property
    def mean(self) -> float | None:
        if any(score.metric != "acc" for score in self.scores):
            return None  # the mean of an accuracy and something else says nothing
        return sum(score.score for score in self.scores) / len(self.scores)


@dataclass(frozen=True)
class TaskSuite:
    """Tasks with their data, loaded and ready to run on any number of models."""

    names: tuple[str, ...]
    loaded: tuple[Any, ...]  # lm-eval's Task and Group objects
    manager: Any


def load_tasks(tasks: Sequence[str], *, progress: Progress = SILENT) -> TaskSuite:
    """Find and load tasks and their data sets, so that a bad name or a missing network shows before a model is loaded.

    Args:
        tasks: names known to lm-eval (tasks, groups, tags), paths of local task files (.yaml), or `paper` for PAPER_TASKS. Relative
            `data_files` in a task file start from the working directory, as with lm-eval's own command.
    Raises:
        BackendError: lm-eval is missing or too old.
        ConfigError: no tasks, an unknown name, the same task twice, a task file that is malformed or that lm-eval refuses.
        DataError: a data set that cannot be read, or that the Hub would have to send while there is no network.
    """
    manager_class = _import_lm_eval()
    wanted = list(dict.fromkeys(name for task in tasks for name in (PAPER_TASKS if task == "paper" else (task,))))
    if not wanted:
        raise ConfigError("load_tasks: expected at least one task, got none. Give a name such as arc_easy, or the path of a task file.")
    files = {name: _read_task_file(Path(name)) for name in wanted if _is_file_name(name)}
    folders = sorted({str(Path(name).resolve().parent) for name, config in files.items() if "group" in config})
    known_needed = len(files) < len(wanted) or bool(folders)  # lm-eval's own index takes ten seconds to build
    with _quiet():
        manager = manager_class(include_path=folders or None, include_defaults=known_needed)
        for name in wanted:
            if name not in files and name not in manager.all_tasks:
                raise ConfigError(_unknown(name, manager.all_tasks))
        loaded: list[Any] = []
        for name in wanted:
            progress.note(f"Loading task {name}.")
            loaded += _load_one(manager, name, _lm_eval_name(name, files, manager.all_tasks))
    names = [_name(task) for task in loaded]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"load_tasks: expected every task once, got {name!r} twice. Rename it in its task file or leave one out.")
    return TaskSuite(tuple(names), tuple(loaded), manager)


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] | TaskSuite,
    *,
    batch_size: int = 1,
    num_fewshot: int = 0,
    limit: int | None = None,
    progress: Progress = SILENT,
) -> TaskResults:
    """Score a causal language model on benchmark tasks with lm-eval.

    Zero-shot by default, seeds fixed (python's, numpy's and torch's generators are re-seeded), no chat template. What stands for a
    task, and enters the mean, is plain `acc`, as the paper reports it for its seven tasks; `acc_norm` (log-likelihood per byte of the
    answer) is in the metrics wherever the task has it. lm-eval's progress bars and warnings go to stderr, stdout stays clean.

    Args:
        model: a transformers causal language model on its device; its training mode is left as it was.
        tokenizer: its transformers tokenizer; not changed.
        tasks: what `load_tasks` takes, or what it returned.
        limit: the first documents of every task only: for trying things out, not for figures to report.
    Raises:
        BackendError, ConfigError, DataError: as `load_tasks`; ConfigError also for a task that fails on its documents.
        ModelError: the model gives log-likelihoods that are not numbers.
        ResourceError: memory ran out.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ConfigError(f"run_tasks: expected {name} of at least {least}, got {value}. Choose a larger one.")
    suite = tasks if isinstance(tasks, TaskSuite) else load_tasks(tasks, progress=progress)
    progress.note(f"lm-eval runs {', '.join(suite.names)}.")
    training = [module for module in model.modules() if module.training]
    work = f"{batch_size} answers at a time"
    try:
        with _quiet(), explain_out_of_memory("run_tasks", work, "Lower --batch-size."):
            found = _simple_evaluate(model, tokenizer, suite, batch_size=batch_size, num_fewshot=num_fewshot, limit=limit)
    finally:
        for module in training:
            module.training = True
    return TaskResults(_scores(found, suite), num_fewshot, limit)


def recovery(dense: TaskResults, pruned: TaskResults) -> dict[str, float | None]:
    """What the pruned model keeps of the dense one, in per cent: pruned / dense for each task, and for their `mean`.

    100 is as good as dense. Where less is better the quotient is turned over. None where it is not defined (dense at zero, no mean).

    Raises: ConfigError: the two were not scored on the same tasks.
    """
    names = [score.task for score in dense.scores]
    if names != [score.task for score in pruned.scores]:
        raise ConfigError(
            f"recovery: expected the same tasks twice, got {', '.join(names)} and {', '.join(s.task for s in pruned.scores)}. "
            "Run both models on one list of tasks."
        )
    kept = {old.task: percent(old.score, new.score, old.higher_is_better) for old, new in zip(dense.scores, pruned.scores, strict=True)}
    both = dense.mean is not None and pruned.mean is not None
    return {**kept, "mean": percent(dense.mean or 0.0, pruned.mean or 0.0) if both else None}


def percent(dense: float, pruned: float, higher_is_better: bool = True) -> float | None:
    """Recovery of one figure in per cent; None where the quotient is not defined."""
    above, below = (pruned, dense) if higher_is_better else (dense, pruned)
    value = 100 * above / below if below else math.nan
    return value if math.isfinite(value) else None


def _import_lm_eval() -> Any:
    """lm-eval's TaskManager, or a BackendError that says what to install."""
    install = "Install it with: pip install 'proxsparse-triton[eval]'"
    try:
        import lm_eval
        import lm_eval.models.huggingface
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BackendError(f"load_tasks: expected lm-eval for --tasks, got {_line(error)}. {install}") from error
    if not hasattr(TaskManager, "load"):
        raise BackendError(f"load_tasks: expected lm-eval {_FIRST_VERSION} or newer, got {lm_eval.__version__}. {install} --upgrade")
    return TaskManager


def _is_file_name(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _read_task_file(path: Path) -> Mapping[str, Any]:
    """The top level of a task file, functions unresolved: enough to refuse what lm-eval would not read, with the line at fault."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Takes lm-eval's `!function module.name` as text."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    try:
        config = yaml.load(read_regular(path, _MOST_BYTES).decode(), Loader=Loader)
    except RecursionError as error:
        raise ConfigError(f"{path}: expected a task in YAML, got lists or mappings nested without end. Correct the file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected a task in YAML, got {_line(error)}. Correct the file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected a task in YAML, got bytes that are not UTF-8. Correct the file.") from error
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable task file, got {error.strerror}. Check the path.") from error
    if not isinstance(config, dict) or not {"task", "group", "include"} & config.keys():
        raise ConfigError(f"{path}: expected a YAML mapping with a `task` or `group` key, got none. Write it as lm-eval's own task files.")
    return config


def _unknown(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3)
    hint = f"Did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them; a task file ends in .yaml."
    return f"load_tasks: expected a task known to lm-eval, got {name!r}. {hint}"


def _lm_eval_name(name: str, files: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> str:
    """What lm-eval calls it: a file goes by its path, but a group only by its name (by its path it is taken for a list of tasks)."""
    if name not in files:
        return name
    group = files[name].get("group")
    if group is None:
        return str(Path(name).resolve())
    if group not in known:  # lm-eval indexes *.yaml only
        raise ConfigError(f"{name}: expected a group in a file ending in .yaml, got {group!r} unknown to lm-eval. Rename the file.")
    return str(group)


def _load_one(manager: Any, name: str, lm_eval_name: str) -> list[Any]:
    """The tasks or the group behind one name, with their data."""
    try:
        found = manager.load([lm_eval_name])
    except Exception as error:  # whatever a task file makes lm-eval, jinja or datasets raise is bad input, not a bug of ours
        if is_out_of_memory(error):
            raise
        raise _explained(name, error) from error
    groups = found.get("groups") or {}
    members = {child for children in (found.get("group_map") or {}).values() for child in children}
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    outer = [group for key, group in groups.items() if key not in members]
    return outer + [task for key, task in found["tasks"].items() if key not in inside]


def _name(task: Any) -> str:
    """A Task calls it task_name, a Group name."""
    return str(getattr(task, "task_name", None) or task.name)


def _explained(name: str, error: Exception) -> DataError | ConfigError:
    """A data set that cannot be had is a DataError, everything else is the task file's fault."""
    libraries = ("datasets", "huggingface_hub", "httpx", "requests")
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in libraries:
        advice = "Check the path in the task file, or the network and the name on the Hub"
        return DataError(f"task {name}: expected its data set, got {_line(error)}. {advice} (HF_HUB_OFFLINE=1 allows cached data only).")
    return ConfigError(f"task {name}: expected a task that lm-eval can run, got {_line(error)}. Compare it with lm-eval's own task files.")


def _line(error: BaseException) -> str:
    """An exception in one line, its type first where the text alone would not say what happened."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text.split()) > 2 else f"{type(error).__name__} {text}".strip()


def _simple_evaluate(model: nn.Module, tokenizer: Any, suite: TaskSuite, *, batch_size: int, **settings: int | None) -> Any:
    """lm_eval.simple_evaluate on the loaded tasks; the raw result."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class CheckedLM(HFLM):  # type: ignore[misc]
        """Refuses NaN, which lm-eval would score as if it were an answer, and token ids that the model has not."""

        def tok_encode(self, *args: Any, **kwargs: Any) -> Any:
            ids = super().tok_encode(*args, **kwargs)
            _check_ids(ids, rows)
            return ids

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            for index, (value, _) in enumerate(answers, start=1):
                if math.isnan(value):
                    raise ModelError(
                        f"run_tasks: expected log-likelihoods that are numbers, got nan for answer {index} of {len(answers)}. "
                        + CHECK_DTYPE
                    )
            return answers

    rows = embedding_rows(model)
    # A copy: lm-eval gives the tokenizer a padding token.
    lm = CheckedLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), SEED)
    try:
        return simple_evaluate(
            lm,
            tasks=list(suite.loaded),
            task_manager=suite.manager,
            batch_size=batch_size,
            log_samples=False,
            **settings,
            **seeds,
        )
    except (ProxSparseError, MemoryError):
        raise
    except Exception as error:  # a document without the field that the task asks for, an answer longer than the model's context, ...
        if is_out_of_memory(error):
            raise
        raise _explained(", ".join(suite.names), error) from error


def _check_ids(ids: Any, rows: int | None) -> None:
    """Raise DataError for token ids beyond the embedding, of one text or of several: lm-eval encodes all before the model runs."""
    largest = max((i for row in ids for i in (row if isinstance(row, list) else [row])), default=0)
    if rows is not None and largest >= rows:
        raise DataError(
            f"run_tasks: expected token ids below {rows}, the rows of the model's embedding, got {largest} in the text of a task. "
            "Use the tokenizer that the model came with."
        )


def _scores(found: Mapping[str, Any], suite: TaskSuite) -> tuple[TaskScore, ...]:
    """One score per task asked for; a group without an aggregate is replaced by its members."""
    results, children = found["results"], found.get("group_subtasks", {})
    scores: list[TaskScore] = []
    queue = list(suite.names)
    while queue:
        name = queue.pop(0)
        score = _score(name, results.get(name, {}), found)
        if score is None:
            queue = [*children.get(name, ()), *queue]
        else:
            scores.append(score)
    if not scores:
        raise ConfigError(f"run_tasks: expected a metric from {', '.join(suite.names)}, got none. Give the task a metric_list.")
    return tuple(scores)


def _score(name: str, raw: Mapping[str, Any], found: Mapping[str, Any]) -> TaskScore | None:
    """One entry of lm-eval's results, `acc,none` and `acc_stderr,none` taken apart; None where it holds no metric."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in raw.items():
        metric, comma, kind = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        label = metric.removesuffix("_stderr") + ("" if kind == "none" else f",{kind}")
        (stderr if metric.endswith("_stderr") else metrics)[label] = float(value)
    if not metrics:
        return None
    metric = "acc" if "acc" in metrics else next(iter(metrics))
    higher = found.get("higher_is_better", {}).get(name, {}).get(metric.partition(",")[0])
    samples = found.get("n-samples", {}).get(name, {}).get("effective", raw.get("sample_len", 0))
    return TaskScore(name, metric, metrics, stderr, higher is not False, int(samples))


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout; of the libraries' logs only errors, and those on stderr."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
