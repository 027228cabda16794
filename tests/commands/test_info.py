import json

import click
import pytest
import torch
import transformers
from click.testing import CliRunner

from proxsparse_triton.cli import main
from proxsparse_triton.inference import choice
from proxsparse_triton.inference.library import judge
from proxsparse_triton.methods.base import method_names
from proxsparse_triton.ops import dispatch


def facts() -> dict[str, str]:
    result = CliRunner().invoke(main, ["info", "--json"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found: dict[str, str] = json.loads(result.stdout)
    return found


def test_versions_devices_and_methods() -> None:
    found = facts()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["transformers"] == transformers.__version__
    assert set(found) >= {"proxsparse-triton", "python", "triton", "safetensors", "datasets", "lm-eval", "matplotlib", "cpu"}
    assert found["methods"] == ", ".join(method_names())
    assert found["operations on cpu tensors"] == "plain torch"
    assert ("compute capability" in found["gpu"]) == torch.cuda.is_available()


def test_how_packed_layers_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: value for name, value in facts().items() if name.startswith("packed layers")}
    assert set(found) == {"packed layers, few tokens", "packed layers, many tokens", "packed layers, measured"}
    if not torch.cuda.is_available():
        assert found["packed layers, few tokens"] == "unpacked weight: not a CUDA GPU"
        assert found["packed layers, many tokens"] == "none: not a CUDA GPU"
    monkeypatch.setattr(choice, "find_library", lambda device: judge((9, 0), cusparselt=800))
    assert "0.8.0" in facts()["packed layers, many tokens"]


def test_what_will_be_used_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "have_triton", lambda: True)
    assert facts()["operations on cuda tensors"] == "triton"
    monkeypatch.setattr(dispatch, "have_triton", lambda: False)
    assert facts()["operations on cuda tensors"] == "plain torch: install triton for speed"


def test_table() -> None:
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    for name, value in facts().items():
        assert any(line.startswith(name) and line.endswith(value) for line in lines), name


def test_it_is_a_command() -> None:
    assert isinstance(main.get_command(click.Context(main), "info"), click.Command)
