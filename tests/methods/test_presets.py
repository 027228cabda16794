import pytest

from proxsparse_triton.errors import ConfigError
from proxsparse_triton.methods.presets import PRESETS, preset

# model: lambda1, lr, context, lambda2, frozen_eps of the paper and its released scripts
PUBLISHED = {
    "llama-2-7b": (0.25, 1e-4, 4096, None, None),
    "llama-2-13b": (0.5, 1e-4, 4096, 0.25, 0.5),
    "llama-3.1-8b": (0.85, 5e-5, 4096, None, None),
    "mistral-7b-v0.1": (20, 5e-5, 4096, None, None),
    "mistral-7b-v0.3": (25, 5e-5, 4096, None, None),
    "openllama-7b-v2": (1.0, 1e-4, 2048, None, None),
    "qwen2.5-14b": (0.2, 1e-4, 4096, None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    values = preset(name)
    keys = ("lambda1", "lr", "seqlen", "lambda2", "frozen_eps")
    assert tuple(values.get(key) for key in keys) == PUBLISHED[name]
    assert set(values) <= set(keys)


def test_complete_and_unspoilt() -> None:
    assert set(PRESETS) == set(PUBLISHED)
    preset("llama-2-7b")["lambda1"] = 9.0
    assert preset("llama-2-7b")["lambda1"] == 0.25


def test_unknown() -> None:
    with pytest.raises(ConfigError, match=r"preset: expected one of llama-2-7b, .*, got 'llama'"):
        preset("llama")
