"""lm-eval on a local task, offline: a trained model beats chance, a damaged one does not, and every bad task is one line."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxsparse_triton.errors import BackendError, ConfigError, DataError, ModelError, ResourceError
from proxsparse_triton.evaluation.harness import (
    PAPER_TASKS,
    TaskResults,
    TaskScore,
    TaskSuite,
    _check_ids,
    load_tasks,
    percent,
    recovery,
    run_tasks,
)

# Without the extras there is nothing to test here.
datasets = pytest.importorskip("datasets")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "proxsparse_triton" / "assets" / "pylm-2m"
DATA = ROOT / "tests" / "data"
TASK = "tests/data/tasks/next_line.yaml"
CHANCE = 0.25


@pytest.fixture(scope="module", autouse=True)
def own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` prepares goes to a folder of the test run; tasks are named from the repository root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def suite() -> TaskSuite:
    return load_tasks([TASK])


@pytest.fixture(scope="module")
def dense(model: Any, tokenizer: Any, suite: TaskSuite) -> TaskResults:
    return run_tasks(model, tokenizer, suite, batch_size=8)


def next_line_items(count: int = 24, before: int = 10) -> list[dict[str, Any]]:
    """Ten lines of a Python file with a `def` among them; its next line among three lines of other files."""
    rng = random.Random(0)
    found = []
    with gzip.open(DATA / "heldout.jsonl.gz", "rt", encoding="utf-8") as records:
        for record in records:
            lines = json.loads(record)["text"].split("\n")
            places = [
                at
                for at in range(before, len(lines))
                if 24 <= len(lines[at]) <= 80
                and lines[at].startswith("        ")
                and lines[at].isascii()
                and any(line.lstrip().startswith("def ") for line in lines[at - before : at])
                and sum(map(len, lines[at - before : at])) < 600
            ]
            if places:
                at = rng.choice(places)
                found.append(("\n".join(lines[at - before : at]), lines[at]))
    rng.shuffle(found)
    items = []
    for number, (context, line) in enumerate(found[:count]):
        choices = [line, *(other for _, other in found[count + 3 * number : count + 3 * number + 3])]
        rng.shuffle(choices)
        items.append({"context": context, "choices": choices, "label": choices.index(line)})
    return items


def write_task(folder: Path, name: str = "local", lines: list[str] | None = None, **changes: Any) -> str:
    """A task file of our own beside its data; `changes` replace keys, None removes them."""
    data = folder / f"{name}.jsonl"
    if lines is None:
        lines = [json.dumps({"context": "def f(x):", "choices": ["    return x", "zzz"], "label": label}) for label in (0, 1, 0)]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = yaml.safe_load((ROOT / TASK).read_text(encoding="utf-8"))
    config |= {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return str(path)


def score(task: str, value: float, metric: str = "acc", higher_is_better: bool = True) -> TaskScore:
    return TaskScore(task, metric, {metric: value}, {}, higher_is_better, 24)


def results(*scores: TaskScore) -> TaskResults:
    return TaskResults(scores, num_fewshot=0, limit=None)


class Small(lm_eval_tasks.TaskManager):
    """lm-eval with the folders of the paper's tasks only: its whole index takes ten seconds to build."""

    def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
        root = Path(lm_eval_tasks.__file__).parent
        folders = [root / name for name in ("arc", "siqa", "hellaswag", "openbookqa", "piqa", "truthfulqa")]
        super().__init__(include_path=folders if include_defaults else include_path, include_defaults=False)


class Local(lm_eval_tasks.TaskManager):
    """Only the folders asked for, to keep the test short."""

    def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
        super().__init__(include_path=include_path, include_defaults=False)


def test_items_come_from_the_held_out_text() -> None:
    stored = (DATA / "tasks" / "next_line.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in stored] == next_line_items()


def test_trained_model_is_clearly_above_chance(dense: TaskResults) -> None:
    (found,) = dense.scores
    assert (found.task, found.metric, found.samples) == ("next_line", "acc", 24)
    assert found.score == found.metrics["acc"] == dense.mean
    # 24 questions: a guesser gets more than half of them right once in 500 tries.
    assert found.score > 0.5
    assert found.metrics["acc_norm"] > 0.5
    assert found.stderr["acc"] == pytest.approx(math.sqrt(found.score * (1 - found.score) / 23), rel=1e-6)


def test_destroyed_model_falls_to_chance(model: Any, tokenizer: Any, suite: TaskSuite, dense: TaskResults) -> None:
    damaged = copy.deepcopy(model)
    for layer in damaged.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data[..., ::2] = 0  # half of the weights, whatever they are worth
    pruned = run_tasks(damaged, tokenizer, suite, batch_size=8)
    assert pruned.scores[0].score <= dense.scores[0].score - 0.15
    kept = recovery(dense, pruned)
    assert kept == {"next_line": pytest.approx(100 * pruned.scores[0].score / dense.scores[0].score), "mean": kept["next_line"]}


def test_independent_of_batch_size_and_of_an_earlier_run(model: Any, tokenizer: Any, suite: TaskSuite, dense: TaskResults) -> None:
    assert run_tasks(model, tokenizer, suite, batch_size=3) == dense


def test_limit_and_names(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    found = run_tasks(model, tokenizer, [TASK, write_task(tmp_path)], limit=2, batch_size=8)
    assert [(one.task, one.samples) for one in found.scores] == [("next_line", 2), ("local", 2)]
    assert found.limit == 2
    assert found.mean == pytest.approx((found.scores[0].score + found.scores[1].score) / 2)


def test_leaves_stdout_tokenizer_and_training_mode_alone(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.train()
    model.lm_head.eval()
    before = copy.deepcopy(tokenizer.special_tokens_map)
    run_tasks(model, tokenizer, [write_task(tmp_path)])
    assert model.training
    assert model.model.training
    assert not model.lm_head.training
    model.eval()
    assert tokenizer.special_tokens_map == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("aggregated", [False, True])
def test_group_of_local_tasks(model: Any, tokenizer: Any, tmp_path: Path, aggregated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", Local)
    for name in ("first", "second"):
        write_task(tmp_path, name)
    group = {"group": "both", "task": ["first", "second"]}
    if aggregated:
        group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean"}]  # type: ignore[list-item]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    found = run_tasks(model, tokenizer, [str(tmp_path / "both.yaml")], batch_size=8)
    assert [one.task for one in found.scores] == (["both"] if aggregated else ["first", "second"])
    assert found.mean == pytest.approx(2 / 3)


def test_group_that_lm_eval_does_not_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", Local)
    (tmp_path / "both.yml").write_text("group: both\ntask: [first]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"both.yml: expected a group in a file ending in .yaml, got 'both'"):
        load_tasks([str(tmp_path / "both.yml")])


def test_paper_tasks_are_known_to_lm_eval() -> None:
    assert set(PAPER_TASKS) <= set(Small().all_tasks)
    assert len(set(PAPER_TASKS)) == 7


def test_paper_expands_to_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", Small)
    with pytest.raises(DataError, match=f"task {PAPER_TASKS[0]}: expected its data set, got Couldn't reach .* network") as caught:
        load_tasks(["paper"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("arc_eazy", "Did you mean arc_easy"), ("zzzzzz", "`lm-eval ls tasks` lists them"), ("tests/data", "task file ends in .yaml")],
)
def test_unknown_task_name(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", Small)
    with pytest.raises(ConfigError, match=f"expected a task known to lm-eval, got '{name}'. .*{hint}"):
        load_tasks([name])


def test_no_tasks() -> None:
    with pytest.raises(ConfigError, match="at least one task, got none"):
        load_tasks([])


def test_lm_eval_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BackendError, match=r"pip install 'proxsparse-triton\[eval\]'"):
        load_tasks([TASK])


def test_lm_eval_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", object)
    with pytest.raises(BackendError, match=r"expected lm-eval 0.4.12 or newer, got .* --upgrade"):
        load_tasks([TASK])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: [1, 2\nmore: 3", "expected a task in YAML, got .*line 2"),
        (b"- a\n- b", "expected a YAML mapping with a `task` or `group` key, got none"),
        (b"dataset_path: json", "expected a YAML mapping with a `task` or `group` key, got none"),
        (b"task: \xff\xfe", "not UTF-8"),
        (None, "expected a readable task file, got No such file"),
    ],
)
def test_malformed_task_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"broken.yaml: .*{message}") as caught:
        load_tasks([str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "guessing"}, "invalid output_type 'guessing'"),
        ({"no_such_key": 1}, "no_such_key"),
        ({"test_split": "missing"}, "KeyError 'missing'"),
        ({"doc_to_text": "{{context"}, "task .*local.yaml"),
        ({"metric_list": [{"metric": "no_such_metric"}]}, "expected a task that lm-eval can run, got KeyError"),
        ({"doc_to_text": "!function"}, None),
    ],
)
def test_task_that_lm_eval_refuses(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    path = write_task(tmp_path, **changes)
    if message is None:
        Path(path).write_text(Path(path).read_text().replace("'!function'", "!function nowhere.text"), encoding="utf-8")
        message = "nowhere"
    with pytest.raises(ConfigError, match=message) as caught:
        load_tasks([path])
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_file_missing_or_malformed(tmp_path: Path) -> None:
    path = write_task(tmp_path, "absent", dataset_kwargs={"data_files": {"test": str(tmp_path / "nowhere.jsonl")}})
    with pytest.raises(DataError, match=r"absent.yaml: expected its data set, got .*nowhere.jsonl"):
        load_tasks([path])
    path = write_task(tmp_path, "torn", ['{"context": "a", "choices": ["b", "c"], "label": 0}', '{"context": '])
    with pytest.raises(DataError, match=r"torn.yaml: expected its data set"):
        load_tasks([path])


def test_two_files_with_one_task_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="every task once, got 'local' twice"):
        load_tasks([write_task(tmp_path), write_task(tmp_path / "other")])


def test_document_that_fails(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"context": "a", "choices": ["b", "c"], "answer": answer}) for answer in ("b", "zzz")]
    path = write_task(tmp_path, "wrong", lines, doc_to_target="{{choices.index(answer)}}")
    with pytest.raises(ConfigError, match=r"task wrong: expected a task that lm-eval can run, got .*zzz"):
        run_tasks(model, tokenizer, [path])


def test_model_that_gives_no_numbers(model: Any, tokenizer: Any, suite: TaskSuite) -> None:
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ModelError, match=r"got nan for answer 1 of 96. Check the dtype"):
        run_tasks(broken, tokenizer, suite, batch_size=32)


def test_out_of_memory(model: Any, tokenizer: Any, suite: TaskSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ResourceError, match=r"memory for 4 answers at a time, got out of memory. Lower --batch-size"):
        run_tasks(model, tokenizer, suite, batch_size=4)


@pytest.mark.parametrize(("setting", "value"), [("batch_size", 0), ("num_fewshot", -1), ("limit", 0)])
def test_settings_out_of_range(model: Any, tokenizer: Any, suite: TaskSuite, setting: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"expected {setting} of at least .*, got {value}"):
        run_tasks(model, tokenizer, suite, **{setting: value})


def test_recovery_by_hand() -> None:
    dense = results(score("a", 0.8), score("b", 0.4))
    pruned = results(score("a", 0.6), score("b", 0.4))
    assert recovery(dense, pruned) == {"a": pytest.approx(75), "b": pytest.approx(100), "mean": pytest.approx(100 * 0.5 / 0.6)}


def test_recovery_where_less_is_better_and_without_a_mean() -> None:
    dense = results(score("a", 0.5), score("b", 10.0, "word_perplexity", higher_is_better=False))
    pruned = results(score("a", 0.5), score("b", 20.0, "word_perplexity", higher_is_better=False))
    assert dense.mean is None
    assert recovery(dense, pruned) == {"a": pytest.approx(100), "b": pytest.approx(50), "mean": None}


def test_recovery_of_nothing() -> None:
    assert recovery(results(score("a", 0.0)), results(score("a", 0.5))) == {"a": None, "mean": None}
    assert percent(1.0, math.inf, higher_is_better=False) == 0.0
    assert percent(math.inf, math.inf) is None


def test_recovery_of_different_tasks() -> None:
    with pytest.raises(ConfigError, match="expected the same tasks twice, got a and b"):
        recovery(results(score("a", 0.5)), results(score("b", 0.5)))


@pytest.mark.parametrize("ids", [[1, 8], [[1], [2, 8]]])
def test_token_ids_beyond_the_embedding_are_refused(ids: list[Any]) -> None:
    _check_ids(ids, 9)
    _check_ids(ids, None)
    with pytest.raises(DataError, match=r"run_tasks: expected token ids below 8, the rows of the model's embedding, got 8 in the text"):
        _check_ids(ids, 8)
