"""Options of the recipe and of repair as they are typed: what they become, what is wrong usage, and what the help says of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxsparse_triton import comparison, pipeline
from proxsparse_triton.cli import main
from proxsparse_triton.errors import ConfigError
from proxsparse_triton.pipeline import RunConfig


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Of the runs that were asked for; none is done."""
    seen: list[RunConfig] = []

    def stop(config: RunConfig, *rest: object) -> None:
        seen.append(config)
        raise ConfigError("stop here")

    monkeypatch.setattr(pipeline, "prune", stop)
    monkeypatch.setattr(comparison, "compare", stop)
    return seen


def run(*arguments: object, command: str = "prune") -> Result:
    return CliRunner().invoke(main, [command, "demo", "-o", "never-written", *map(str, arguments)])


def asked(configs: list[RunConfig], *arguments: object, command: str = "prune") -> RunConfig:
    result = run(*arguments, command=command)
    assert result.exit_code == 1, result.output
    assert result.stderr.strip() == "pst: stop here"
    return configs[-1]


@pytest.mark.parametrize(
    ("arguments", "kind", "steps"),
    [
        ([], None, None),
        (["--repair"], "both", None),
        (["--repair", "--json"], "both", None),
        (["--repair", "--repair-steps", "7"], "both", 7),
        (["--repair", "both"], "both", None),
        (["--repair=both"], "both", None),
        (["--repair=least-squares"], "least-squares", None),
        (["--repair", "finetune", "--repair-steps", "1"], "finetune", 1),
    ],
)
@pytest.mark.parametrize("command", ["prune", "compare"])
def test_repair(command: str, arguments: list[str], kind: str | None, steps: int | None, configs: list[RunConfig]) -> None:
    config = asked(configs, *arguments, command=command)
    assert (config.repair, config.repair_steps) == (kind, steps)


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ([], {}),
        (["--recipe", "auto"], {"recipe": "auto"}),
        (["--recipe", "paper"], {"recipe": "paper"}),
        (["--lambda1", "auto", "--lr", "auto"], {}),
        (["--lambda1", "0", "--lr", "auto"], {"lambda1": 0.0}),
        (["--lambda1", "auto", "--lr", "1e-3"], {"lr": 1e-3}),
        (["--loss", "ce", "--forward", "learned", "--train", "all"], {"loss": "ce", "forward": "learned", "train": "all"}),
        (["--loss", "kl", "--forward", "masked", "--train", "pruned"], {"loss": "kl", "forward": "masked", "train": "pruned"}),
        (["--prox-scale", "none"], {"prox_scale": "none"}),
        (["--prox-scale", "activations", "--temperature", "1.5"], {"prox_scale": "activations", "temperature": 1.5}),
        (["--layer-weight", "0"], {"layer_weight": 0.0}),
        (["--layer-weight", "0.5", "--temperature", "2"], {"layer_weight": 0.5, "temperature": 2.0}),
        (["--steps", "30"], {"steps": 30}),
    ],
)
def test_settings_of_the_method(arguments: list[str], settings: dict[str, Any], configs: list[RunConfig]) -> None:
    """None is handed over that was not given: the recipe decides about it."""
    assert asked(configs, *arguments).settings == settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambda1", "much"], "Invalid value for '--lambda1': expected auto or a number, got 'much'"),
        (["--lr", "1e-3x"], "Invalid value for '--lr': expected auto or a number, got '1e-3x'"),
        (["--lr", ""], "Invalid value for '--lr': expected auto or a number, got ''"),
        (["--lr", "Auto"], "expected auto or a number, got 'Auto'"),
        (["--temperature", "auto"], "Invalid value for '--temperature': 'auto' is not a valid float"),
        (["--layer-weight", "auto"], "Invalid value for '--layer-weight': 'auto' is not a valid float"),
        (
            ["--repair", "all"],
            "'--repair': expected both, least-squares, finetune or nothing, got 'all'. If that is MODEL, write it first, or --repair=both.",
        ),
        (["--repair", "--repair-steps", "few"], "Invalid value for '--repair-steps': 'few' is not a valid integer"),
        (["--loss", "mse"], "Invalid value for '--loss': 'mse' is not one of 'kl', 'ce'"),
        (["--forward", "w0"], "'w0' is not one of 'masked', 'learned'"),
        (["--train", "head"], "'head' is not one of 'pruned', 'all'"),
        (["--prox-scale", "wanda"], "'wanda' is not one of 'activations', 'none'"),
        (["--recipe", "best"], "'best' is not one of 'auto', 'paper'"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "compare"])
def test_usage_errors_exit_with_2(command: str, arguments: list[str], message: str, configs: list[RunConfig]) -> None:
    result = run(*arguments, command=command)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Usage:" in result.stderr
    assert result.stdout == ""
    assert configs == []


@pytest.mark.parametrize("command", ["prune", "compare"])
def test_help(command: str) -> None:
    """What each option takes, what it is for, and what happens without it."""
    result = CliRunner().invoke(main, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    entries = re.split(r"^ +(?=-)", result.stdout, flags=re.MULTILINE)[1:]
    lines = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    for option, texts in {
        "--recipe": ("[auto|paper]", "as published", "Default: auto."),
        "--loss": ("[kl|ce]", "divergence from the dense model, or cross-entropy"),
        "--forward": ("[masked|learned]", "original weights under the current mask"),
        "--prox-scale": ("[activations|none]",),
        "--train": ("[pruned|all]",),
        "--temperature": ("FLOAT", "--loss kl", "Default: 1."),
        "--layer-weight": ("FLOAT", "hidden states' errors in --loss kl", "Default: 1; 0: logits only."),
        "--lambda1": ("auto|X", "Default: from scale and steps."),
        "--lr": ("auto|X", "Default: from weight scale and steps."),
        "--epochs": ("800 windows, at most 4; paper: 1",),
        "--steps": ("INTEGER", "instead of --epochs"),
        "--repair": ("[both|least-squares|finetune]", "(alone) both"),
        "--repair-steps": ("N", "[default: the auto recipe's passes]"),
    }.items():
        for text in texts:
            assert text in lines[option], option
