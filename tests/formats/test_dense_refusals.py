"""What the writer of pruned models refuses, before and after the work."""

import math
from pathlib import Path

import pytest
import torch
from formats.folders import prune, tiny
from torch import Tensor

from proxsparse_triton.errors import ConfigError, ModelError, OutputError, ShapeError
from proxsparse_triton.formats.dense import check_parameters, write_pruned_model
from proxsparse_triton.formats.shards import model_files

pytestmark = pytest.mark.usefixtures("one_thread")

W = torch.ones(2, 8)
MASK = torch.tensor([[1, 1, 0, 0] * 2] * 2).bool()


class TestRefusals:
    @pytest.mark.parametrize(
        ("tensors", "masks", "weights", "error", "message"),
        [
            (
                {"w": W},
                {f"q{i}.w_q": MASK for i in range(4)},
                None,
                ModelError,
                r"got 4 without a key of their own: q0\.w_q, q1\.w_q, q2\.w_q",
            ),
            ({"w": W}, {"w": MASK[:1]}, None, ShapeError, r"mask of w in the stored shape \(2, 8\), got \(1, 8\)"),
            ({"w": W}, {"w": ~torch.zeros(2, 8, dtype=torch.bool)}, None, ShapeError, "got 4 in block"),
            ({"w": W}, {"w": MASK}, {"w": W[:, :4]}, ShapeError, r"weight of w in the stored shape \(2, 8\), got \(2, 4\)"),
            ({"w": W}, {"w": MASK}, {"v": W}, ModelError, "without a key of their own: v"),
            ({"w": W.to(torch.float8_e4m3fn)}, {"w": MASK}, None, ModelError, "at least 16 bits, got F8_E4M3 in w. Dequantize"),
            ({"w": W.to(torch.int32)}, {"w": MASK}, None, ModelError, "got I32 in w"),
            ({"w": W.half()}, {"w": MASK}, {"w": W * 1e5}, ModelError, "values that torch.float16 can hold, got an overflow in w"),
        ],
    )
    def test_what_does_not_fit(
        self,
        tmp_path: Path,
        tensors: dict[str, Tensor],
        masks: dict[str, Tensor],
        weights: dict[str, Tensor] | None,
        error: type[Exception],
        message: str,
    ) -> None:
        folder = tiny(tmp_path / "in", tensors)
        with pytest.raises(error, match=message) as caught:
            prune(folder, tmp_path / "out", masks, weights=weights)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "config.json").exists()

    @pytest.mark.parametrize(
        ("tensors", "shapes", "error", "message"),
        [
            (
                {"a.w": W},
                {"b.w": (2, 8)},
                ModelError,
                r"prune: expected .* got 1 without a key of their own: b\.w\. This arch",
            ),
            ({"w": W}, {"w": (8, 2)}, ShapeError, r"mask of w in the stored shape \(2, 8\), got \(8, 2\)"),
            ({"w": W.to(torch.float8_e4m3fn)}, {"w": (2, 8)}, ModelError, "at least 16 bits, got F8_E4M3 in w. Dequantize"),
        ],
    )
    def test_before_the_work(
        self, tmp_path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]], error: type[Exception], message: str
    ) -> None:
        files = model_files(tiny(tmp_path / "in", tensors))
        with pytest.raises(error, match=message):
            check_parameters(files, shapes)
        check_parameters(files, {})

    def test_bad_configs_and_entries(self, tmp_path: Path) -> None:
        folder = tiny(tmp_path / "in", {"w": W}, config="{")
        with pytest.raises(ModelError, match=r"config\.json"):
            prune(folder, tmp_path / "out", {"w": MASK})
        tiny(folder)
        with pytest.raises(ConfigError, match="finite numbers, got nan at lambda1"):
            write_pruned_model(folder, model_files(folder), tmp_path / "out", {}, config_entry={"lambda1": math.nan})
        assert not (tmp_path / "out").exists()

    def test_the_original_is_never_the_output(self, tmp_path: Path) -> None:
        folder = tiny(tmp_path / "in", {"w": W})
        before = (folder / "model.safetensors").read_bytes()
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(OutputError, match="output folder of its own"):
            prune(folder, tmp_path / "link", {"w": MASK})
        assert (folder / "model.safetensors").read_bytes() == before

    def test_corrupt_shards_and_files_outside(self, tmp_path: Path) -> None:
        folder = tiny(tmp_path / "in", {"w": W})
        file = folder / "model.safetensors"
        with pytest.raises(ModelError, match="inside"):
            write_pruned_model(folder, [folder / ".." / "in" / file.name], tmp_path / "out", {}, config_entry={})
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(ModelError, match="truncated"):
            write_pruned_model(folder, [file], tmp_path / "out", {}, config_entry={})
