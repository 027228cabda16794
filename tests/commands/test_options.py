"""The shared options against the code they feed: a renamed field must not leave an option behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest

from proxsparse_triton.commands.compare import compare
from proxsparse_triton.commands.options import METHOD_FIELDS, METHOD_OPTIONS, RUN_OPTIONS, method_settings, run_config, with_options
from proxsparse_triton.commands.prune import prune
from proxsparse_triton.methods.base import method_class, method_names
from proxsparse_triton.pipeline import RunConfig


def defaults(options: tuple[Any, ...], *arguments: str) -> dict[str, Any]:
    """What a command with these options is called with."""

    @with_options(options)
    def nothing() -> None:
        pass

    return click.command()(nothing).make_context("test", list(arguments)).params


def test_method_options_are_fields_of_methods() -> None:
    fields = {field.name for name in method_names() for field in dataclasses.fields(method_class(name))}
    assert set(defaults(METHOD_OPTIONS)) == set(METHOD_FIELDS)
    assert set(METHOD_FIELDS) <= fields
    assert all(value is None for value in defaults(METHOD_OPTIONS).values())  # None: the method's own default


def test_defaults_are_those_of_the_library() -> None:
    options = defaults(RUN_OPTIONS, "-o", "run")
    assert options.pop("as_json") is False
    config = run_config("some/model", options)
    assert config.command is not None
    assert config.command.startswith("pst")
    assert dataclasses.replace(config, command=None) == RunConfig(model="some/model", output=Path("run"))


@pytest.mark.parametrize(
    ("model", "given", "used"), [("demo", None, "stdlib"), ("org/model", None, "c4"), ("demo", "c4", "c4"), ("demo", "", "")]
)
def test_default_text(model: str, given: str | None, used: str) -> None:
    options = defaults(RUN_OPTIONS, "-o", "run", *([] if given is None else ["--calibration", given]))
    options.pop("as_json")
    assert run_config(model, options).calibration == used


def test_method_settings_are_taken_out() -> None:
    options = {"lambda1": 0.0, "lr": None, "mask_only": None, "samples": 4}
    assert method_settings(options) == {"lambda1": 0.0}  # zero is a value
    assert options == {"samples": 4}


@pytest.mark.parametrize("command", [prune, compare])
def test_every_option_has_help_or_speaks_for_itself(command: click.Command) -> None:
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help or option.name == "seed", option.name
