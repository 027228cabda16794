import torch
from torch import nn

from proxsparse_triton.methods.base import PruneTask
from proxsparse_triton.methods.magnitude import Magnitude, magnitude_mask
from proxsparse_triton.models.selection import LayerChoice, LayerPlan


def test_two_largest_magnitudes(device: str) -> None:
    w = torch.tensor([[0.1, -3.0, 2.0, 0.0, -1.0, -2.0, 0.5, 4.0]], device=device)
    assert magnitude_mask(w).tolist() == [[False, True, True, False, False, True, False, True]]


def test_ties_go_to_the_highest_index() -> None:
    """Documented in the function: published baselines do whatever topk does, and this rule is nearest to it."""
    w = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    assert magnitude_mask(w).nonzero()[:, 1].tolist() == [2, 3, 4, 7, 10, 11]


def test_like_topk_where_nothing_ties(device: str) -> None:
    w = torch.randn(63, 44, generator=torch.Generator().manual_seed(0)).to(device)
    blocks = w.abs().unflatten(-1, (-1, 4))
    expected = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, blocks.topk(2).indices, True).flatten(-2)
    assert torch.equal(magnitude_mask(w), expected.cpu())


def test_needs_no_text_and_leaves_the_model_as_it_is(device: str) -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(8, 3)])).to(device)
    before = model[0][0].weight.detach().clone()
    plan = LayerPlan((LayerChoice("0.0", (3, 8), True, "", 0),), "0")
    result = Magnitude().prune(PruneTask(model, plan, ()))
    assert not Magnitude.needs_calibration
    assert result.weights is None
    assert list(result.masks) == ["0.0.weight"]
    assert result.masks["0.0.weight"].device.type == "cpu"
    assert torch.equal(model[0][0].weight, before)
