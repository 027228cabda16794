"""SparseGPT against what it approximates: the least-squares optimum for a mask, and simpler ways to choose one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from proxsparse_triton.errors import LearningError
from proxsparse_triton.methods.base import PruneTask
from proxsparse_triton.methods.magnitude import magnitude_mask
from proxsparse_triton.methods.sparsegpt import SparseGPT, inverse_factor, sparsegpt_24
from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.sparsity import check_mask


def correlated(seed: int, width: int = 40, tokens: int = 400) -> Tensor:
    """Hessian of inputs whose features are correlated and of unequal scale, fp32."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) + 2 * torch.eye(width)
    scale = torch.rand(width, generator=generator) * 3 + 0.2
    x = torch.randn(tokens, width, generator=generator) @ mix * scale
    return 2 / tokens * x.T @ x


def weights(seed: int, rows: int = 23, width: int = 40) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 100))


def error(change: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) in fp64."""
    change, hessian = change.double().cpu(), hessian.double().cpu()
    return float(((change @ hessian) * change).sum())


def least_squares(w: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The best kept weights for a mask, row by row: w_S + H_SS^-1 H_SP w_P."""
    w, hessian = w.double(), hessian.double()
    best = torch.zeros_like(w)
    for row in range(len(w)):
        kept, gone = mask[row], ~mask[row]
        best[row, kept] = w[row, kept] + torch.linalg.solve(hessian[kept][:, kept], hessian[kept][:, gone] @ w[row, gone])
    return best


@pytest.mark.parametrize("seed", range(3))
def test_between_the_optimum_and_the_simpler_ways(seed: int, device: str) -> None:
    w, hessian = weights(seed), correlated(seed)
    updated, mask = (tensor.cpu() for tensor in sparsegpt_24(w.to(device), hessian.to(device)))
    check_mask("test", "w", mask)
    assert not updated[~mask].any()
    reached = error(updated - w, hessian)
    assert error(least_squares(w, mask, hessian) - w, hessian) <= reached
    assert reached < 0.9 * error(w * ~mask, hessian)  # the same mask without an update
    magnitude = magnitude_mask(w)
    assert reached < 0.9 * error(w * ~magnitude, hessian)
    # and its mask is a better one to solve for than magnitude's
    assert error(least_squares(w, mask, hessian) - w, hessian) < error(least_squares(w, magnitude, hessian) - w, hessian)


def test_diagonal_hessian_needs_no_update(device: str) -> None:
    """Without correlation nothing can make up for a pruned weight: the mask is the two largest |w| sqrt(h), the rest stays."""
    w, diagonal = weights(0), torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1
    updated, mask = (t.cpu() for t in sparsegpt_24(w.to(device), torch.diag(diagonal).to(device), dampening=1e-6))
    blocks = (w.abs() * diagonal.sqrt()).unflatten(-1, (-1, 4))
    expected = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, blocks.topk(2).indices, True).flatten(-2)
    assert torch.equal(mask, expected)
    assert torch.equal(updated, w * mask)


def test_against_the_textbook_in_fp64() -> None:
    """Column by column with the inverse Hessian shrunk by Gaussian elimination, without blocks or Cholesky factors."""
    w, hessian = weights(5, rows=7, width=12), correlated(5, width=12)
    updated, mask = sparsegpt_24(w, hessian, dampening=0.01)
    rest = w.double().clone()
    inverse = torch.linalg.inv(hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(12, dtype=torch.float64))
    kept = torch.zeros_like(mask)
    for j in range(12):
        if j % 4 == 0:
            diagonal = []
            shrunk = inverse.clone()
            for k in range(j, j + 4):
                diagonal.append(shrunk[k, k].item())
                shrunk = shrunk - torch.outer(shrunk[:, k], shrunk[k]) / shrunk[k, k]
            score = rest[:, j : j + 4] ** 2 / torch.tensor(diagonal, dtype=torch.float64)
            kept[:, j : j + 4].scatter_(-1, score.topk(2).indices, True)
        loss = torch.where(kept[:, j], 0.0, rest[:, j]) / inverse[j, j]
        rest -= torch.outer(loss, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert torch.equal(mask, kept)
    torch.testing.assert_close(updated.double(), rest * kept, rtol=1e-4, atol=1e-5)


def test_column_blocks_only_change_rounding() -> None:
    w, hessian = weights(1), correlated(1)
    updated, mask = sparsegpt_24(w, hessian, column_block=128)
    for column_block in (4, 12, 16):
        other, same = sparsegpt_24(w, hessian, column_block=column_block)
        assert torch.equal(same, mask)
        torch.testing.assert_close(other, updated, rtol=1e-4, atol=1e-4)


def test_dead_features(device: str) -> None:
    w, hessian = weights(2), correlated(2)
    dead = torch.tensor([0, 5, 6, 8, 9, 10, 11])  # one, two and four of a block
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    updated, mask = (tensor.cpu() for tensor in sparsegpt_24(w.to(device), hessian.to(device)))
    check_mask("test", "w", mask)
    assert updated.isfinite().all()
    assert not updated[:, dead].any()
    assert not mask[:, [0, 5, 6]].any()  # a live feature is always worth more


def test_the_input_is_left_alone() -> None:
    w, hessian = weights(3), correlated(3)
    before = w.clone(), hessian.clone()
    sparsegpt_24(w, hessian)
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])


def test_factor_of_the_damped_inverse() -> None:
    hessian = correlated(4, width=12)
    upper = inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(upper.double().T @ upper.double() @ damped, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-3)
    assert torch.equal(upper, upper.triu())


def test_dampening_grows_until_the_factorisation_works() -> None:
    """Eigenvalues 1 and -0.05 of the mean: dampening 0.01 is not enough, 0.1 is."""
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    values = torch.full((12,), 1.0, dtype=torch.float64)
    values[0] = -0.05
    hessian = basis @ torch.diag(values) @ basis.T
    upper = inverse_factor(hessian, 0.01)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped))


def test_hopeless_hessian() -> None:
    broken = -torch.eye(8)
    with pytest.raises(LearningError, match=r"sparsegpt: expected a positive definite Hessian, .* dampening 10\. "):
        inverse_factor(broken, 0.01)
    with pytest.raises(LearningError, match="sparsegpt: expected a finite Hessian, got NaN or inf in it"):
        inverse_factor(torch.full((8, 8), torch.nan), 0.01)


def test_fewer_tokens_than_features_still_works() -> None:
    """A rank-2 Hessian is what too little calibration text gives."""
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    updated, mask = sparsegpt_24(weights(0), x.T @ x)
    assert updated.isfinite().all()
    check_mask("test", "w", mask)


def tiny_task(device: str, skip: tuple[str, ...] = ()) -> PruneTask:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).eval().to(device)
    generator = torch.Generator().manual_seed(1)
    texts = tuple(torch.randint(48, (24,), generator=generator) for _ in range(6))
    return PruneTask(model, plan_layers(model, skip=skip), texts)


def test_mask_only_keeps_the_original_weights(device: str) -> None:
    result = SparseGPT(mask_only=True).prune(tiny_task(device))
    assert result.weights is None
    updated = SparseGPT().prune(tiny_task(device))
    assert updated.weights is not None
    # The first block sees the same inputs either way.
    first = [name for name in result.masks if "layers.0." in name]
    assert all(torch.equal(result.masks[name], updated.masks[name]) for name in first)
    for name, mask in updated.masks.items():
        check_mask("test", name, mask)
        assert not updated.weights[name][~mask].any()


def test_weights_are_copies(device: str) -> None:
    """The caller's result must not change with a model that goes on living."""
    task = tiny_task(device)
    result = SparseGPT().prune(task)
    assert result.weights is not None
    name, linear = next(iter(task.linears().items()))
    before = result.weights[name].clone()
    linear.weight.data.fill_(7.0)
    assert torch.equal(result.weights[name], before)


def test_skipped_layers_stay_dense(device: str) -> None:
    task = tiny_task(device, skip=("down_proj",))
    before = task.model.get_parameter("model.layers.0.mlp.down_proj.weight").detach().clone()
    result = SparseGPT().prune(task)
    assert not any("down_proj" in name for name in result.masks)
    assert len(result.masks) == 12
    assert torch.equal(task.model.get_parameter("model.layers.0.mlp.down_proj.weight"), before)


def test_one_layer_equals_the_function(device: str) -> None:
    """The method feeds each layer the Hessian of its inputs in the pruned model."""
    task = tiny_task(device, skip=("mlp", "k_proj", "v_proj", "o_proj", r"layers\.1"))
    seen = []
    name, linear = next(iter(task.linears().items()))
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for text in task.windows:
            task.model(input_ids=text[None].to(device))
    handle.remove()
    x = torch.cat(seen)
    expected, mask = sparsegpt_24(linear.weight, 2 / len(x) * x.T @ x)
    result = SparseGPT().prune(task)
    assert result.weights is not None
    assert torch.equal(result.masks[name], mask.cpu())
    torch.testing.assert_close(result.weights[name], expected.cpu(), rtol=1e-4, atol=1e-5)
