"""The numbers of both recipes from first principles, and what they do not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from methods.tiny import WINDOWS, task

from proxsparse_triton.errors import ConfigError
from proxsparse_triton.methods.proxsparse import ProxSparse
from proxsparse_triton.methods.recipes import RECIPES, recipe
from proxsparse_triton.training.loop import steps_of


def test_paper_is_the_published_setting_of_llama_2_7b() -> None:
    """Weights of rms 0.02 and 400 steps: lambda1 0.25 and lr 1e-4, whose ratio to the scale and the steps holds for any others."""
    paper = recipe("paper")
    assert paper.lambda1(0.02, 400) == pytest.approx(0.25)
    assert paper.lr(0.02, 400) == pytest.approx(1e-4)
    for sigma, steps in ((0.3, 7), (1e-3, 1600)):
        assert paper.lambda1(sigma, steps) * steps * sigma == pytest.approx(2.0)
        assert paper.lr(sigma, steps) * steps / sigma == pytest.approx(2.0)


def test_auto_travels_with_the_root_of_the_steps() -> None:
    """lambda1 = 1 / (T sigma), lr = 5 sigma / T sqrt(T / 400): four times the steps, twice the way, half of the rate."""
    auto = recipe("auto")
    for sigma, steps in ((0.02, 400), (0.3, 7), (1e-3, 1600)):
        assert auto.lambda1(sigma, steps) * steps * sigma == pytest.approx(1.0)
        assert auto.lr(sigma, steps) * steps / sigma == pytest.approx(5.0 * math.sqrt(steps / 400))
    assert auto.lr(0.02, 400) == pytest.approx(2.5e-4)
    assert auto.lr(0.02, 1600) == pytest.approx(auto.lr(0.02, 400) / 2)


def test_what_is_learned_from() -> None:
    found = {name: (r.objective.loss, r.objective.forward, r.objective.train, r.prox_scale, r.per_tensor) for name, r in RECIPES.items()}
    assert found == {"paper": ("ce", "learned", "all", "none", False), "auto": ("kl", "masked", "pruned", "activations", True)}
    assert (recipe("auto").objective.temperature, recipe("auto").objective.layer_weight) == (1.0, 1.0)


@pytest.mark.parametrize(("windows", "passes"), [(1, 4), (100, 4), (200, 4), (399, 3), (400, 2), (799, 2), (800, 1), (1600, 1)])
def test_passes(windows: int, passes: int) -> None:
    """As many as make 800 windows, at most four; the paper's one."""
    assert recipe("auto").epochs(windows) == passes
    assert recipe("paper").epochs(windows) == 1
    assert steps_of(windows, ProxSparse().loop_config(windows)) == passes * windows
    assert steps_of(windows, ProxSparse(recipe="paper").loop_config(windows)) == windows
    # what is asked for wins: windows count whatever the batch, steps are steps
    assert steps_of(windows, ProxSparse(batch_size=3).loop_config(windows)) == passes * math.ceil(windows / 3)
    assert steps_of(windows, ProxSparse(epochs=5).loop_config(windows)) == 5 * windows
    assert steps_of(windows, ProxSparse(steps=37).loop_config(windows)) == 37


def strengths(name: str, scale: float) -> dict[str, tuple[float, float]]:
    """(lambda1 sigma, lr / sigma) of every group of a model whose weights are `scale` times as large; sigma of what it is derived from."""
    given = task("cpu")
    linears = given.linears()
    for linear in linears.values():
        linear.weight.data *= scale
    optimizer = ProxSparse(recipe=name).optimizer(given.model, linears, WINDOWS)
    together = torch.cat([linear.weight.detach().flatten() for linear in linears.values()])
    found: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        of = group["params"][0] if name == "auto" and group["prox"] else together
        sigma = float(of.detach().double().square().mean().sqrt())
        found[group["param_names"][0]] = (group["lambda1"] * sigma, group["lr"] / sigma)
    return found


@pytest.mark.parametrize(("name", "strength", "travel"), [("paper", 2.0, 2.0), ("auto", 1.0, 5.0 * math.sqrt(WINDOWS / 400))])
def test_scale_law(name: str, strength: float, travel: float) -> None:
    """Ten times the weights, the same in units of the weights: of each tensor (auto), of all together (paper)."""
    one, ten = strengths(name, 1.0), strengths(name, 10.0)
    assert list(one) == list(ten)
    assert len(one) == (15 if name == "auto" else 2)  # 14 matrices, and the others that learn here
    for group, figures in one.items():
        assert figures == pytest.approx((strength / WINDOWS, travel / WINDOWS), rel=1e-5), group
        assert ten[group] == pytest.approx(figures, rel=1e-5), group


def test_tensors_of_unequal_scale() -> None:
    """Auto gives each its own strength; the paper one to all. A tensor of zeros takes that of all."""
    given = task("cpu")
    linears = given.linears()
    first, second, *_ = linears
    linears[first].weight.data *= 8.0
    linears[second].weight.data.zero_()
    groups: Any = {name: ProxSparse(recipe=name).optimizer(given.model, linears, WINDOWS).param_groups for name in RECIPES}
    auto = {group["param_names"][0]: group for group in groups["auto"] if group["prox"]}
    assert list(auto) == list(linears)
    *_, last = linears
    sigmas = {name: float(linears[name].weight.detach().square().mean().sqrt()) for name in (first, last)}
    assert auto[first]["lambda1"] / auto[last]["lambda1"] == pytest.approx(sigmas[last] / sigmas[first], rel=1e-5)
    assert auto[first]["lr"] / auto[last]["lr"] == pytest.approx(sigmas[first] / sigmas[last], rel=1e-5)
    prox, _ = groups["paper"]
    assert prox["param_names"] == list(linears)
    assert auto[second]["lambda1"] == pytest.approx(prox["lambda1"] / 2)  # strength 1 against 2, of the same sigma


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"^proxsparse: expected --recipe paper or auto, got 'papr'\. Choose one of these\.$"):
        recipe("papr")
    with pytest.raises(ConfigError, match="--recipe paper or auto, got ''"):
        ProxSparse(recipe="")
