"""ProxAdamW and attach_prox on DTensors: two ranks on the CPU, the scenarios of ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from proxsparse_triton.ops.sharded import WHOLE, _widths, all_sum, is_dtensor, local, part_of

SCRIPT = Path(__file__).parent / "ranks.py"
SCENARIOS = [
    *("equal", "clipped", "broken_gradient", "columns", "state_dict", "attached", "refusals"),
    *("operations", "masks", "partial_gradients", "initialised"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of both ranks: scenario -> traceback, empty where it passed. Started once for all scenarios."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parents[2])}
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), errors
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.multirank
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks(results: list[dict[str, str]], scenario: str) -> None:
    for result in results:
        assert not result[scenario], result[scenario]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_columns_of_every_rank() -> None:
    """Two dimensions of a mesh cut one after the other: 20 columns on 2 x 3 ranks are 10 and 10, then 4, 4 and 2 of each."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    assert _widths(20, 1, (2, 3), [Shard(1), Shard(1)])[0] == {4, 2}
    assert _widths(24, 1, (2, 3), [Shard(1), Shard(1)])[0] == {4}
    assert _widths(20, 1, (2, 3), [Shard(0), Replicate()])[0] == {20}
    assert _widths(4, 1, (3,), [Shard(1)])[0] == {2, 0}
    assert _widths(16, 1, (2, 2), [_StridedShard(1, split_factor=2), Shard(1)])[0] == {4}
    assert 4 not in _widths(8, 1, (2, 2), [_StridedShard(1, split_factor=2), Shard(1)])[0]


def test_plain_tensors_need_no_process_group() -> None:
    w, rows = torch.ones(3, 4, requires_grad=True), torch.rand(1, 4)
    assert not is_dtensor(w)
    assert part_of(w) == WHOLE
    assert local(w).data_ptr() == w.data_ptr()
    assert not local(w).requires_grad
    assert torch.equal(all_sum(rows, [w]), rows)
