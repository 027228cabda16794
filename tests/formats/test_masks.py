import json
import math
import re
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from proxsparse_triton.errors import ConfigError, ModelError, OutputError, ShapeError
from proxsparse_triton.formats import masks as masks_module
from proxsparse_triton.formats.masks import apply_masks, load_masks, save_masks

METADATA = {"format": "proxsparse-masks", "version": "1"}


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    scores = torch.rand(math.prod(shape) // 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(2, dim=1).indices, True).reshape(shape)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9).map(lambda blocks: 4 * blocks)), min_size=1, max_size=4), st.integers(0, 2**31)
)
def test_round_trip_is_bit_exact(tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], seed: int) -> None:
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    masks = {f"layer.{i}.weight": random_mask(*shape, seed=seed + i) for i, shape in enumerate(shapes)}
    save_masks(path, masks)
    loaded = load_masks(path)
    assert list(loaded) == list(masks)  # the model's order
    for name, mask in masks.items():
        assert loaded[name].dtype == torch.bool
        assert loaded[name].shape == mask.shape
        assert torch.equal(loaded[name], mask)


def test_every_pattern_at_every_place() -> None:
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for place in range(3):
        for pattern, pair in enumerate(pairs):
            mask = torch.zeros(3, 4, dtype=torch.bool)
            mask[:, :2] = True  # pattern 0
            mask[place] = torch.tensor([i in pair for i in range(4)])
            assert masks_module._pack("m", mask.reshape(1, 12)).tolist() == [pattern * 6**place]


def test_size_shape_metadata_and_other_ranks(tmp_path: Path) -> None:
    masks = {"b": random_mask(768, 512), "a": random_mask(3, 5, 8), "c": random_mask(4)}
    save_masks(tmp_path, masks, {"model": "demo ü"})  # a folder: the file gets the standard name
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]
    assert (tmp_path / "masks.safetensors").stat().st_size < 768 * 512 / 12 + 700
    with safe_open(tmp_path / "masks.safetensors", framework="numpy") as file:
        assert file.metadata() == {**METADATA, "model": "demo ü", "shapes": json.dumps({"b": [768, 512], "a": [3, 5, 8], "c": [4]})}
    for path in (tmp_path, str(tmp_path / "masks.safetensors")):
        assert all(torch.equal(mask, masks[name]) for name, mask in load_masks(path).items())


def test_the_reader_of_the_docstring_works(tmp_path: Path) -> None:
    masks = {"a": random_mask(7, 20), "b": random_mask(2, 4)}
    save_masks(tmp_path, masks)
    reader = re.search(r"A reader in numpy:\n\n(.*)", masks_module.__doc__ or "", re.DOTALL)
    assert reader is not None
    scope: dict[str, object] = {"path": tmp_path / "masks.safetensors"}
    exec(textwrap.dedent(reader[1]), scope)
    read = scope["masks"]
    assert isinstance(read, dict)
    assert all(np.array_equal(read[name], mask.numpy()) for name, mask in masks.items())


def test_equal_masks_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_masks(tmp_path / name, {"a": random_mask(16, 16)}, {"z": "1", "b": "2", "k": "3"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_views_and_wide_layers_are_fine_and_fast(tmp_path: Path) -> None:
    mask = random_mask(8, 16)
    save_masks(tmp_path, {"view": mask[::2], "t": mask.reshape(16, 8)[:, 4:]})
    loaded = load_masks(tmp_path)
    assert torch.equal(loaded["view"], mask[::2])
    assert torch.equal(loaded["t"], mask.reshape(16, 8)[:, 4:])
    large = random_mask(4000, 5000)
    start = time.process_time()
    save_masks(tmp_path, {"large": large})
    assert torch.equal(load_masks(tmp_path)["large"], large)
    assert time.process_time() - start < 3  # 20 M weights; about 0.3 s on one idle core


class TestSaveRefuses:
    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.ones(2, 4, dtype=torch.bool), r"got 4 in block \(0, 0\) \(2 blocks are wrong\)"),
            (torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0]]).bool(), r"got 1 in block \(0, 1\)"),
            (random_mask(2, 4).float(), "expected a bool mask for w, got torch.float32"),
            (torch.ones(2, 6, dtype=torch.bool), r"divisible by 4, got shape \(2, 6\)"),
            (torch.tensor(True), "got a scalar"),
        ],
    )
    def test_masks_that_are_not_24(self, tmp_path: Path, mask: Tensor, message: str) -> None:
        with pytest.raises(ShapeError, match=message):
            save_masks(tmp_path, {"w": mask})
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("metadata", [{"shapes": "x"}, {"format": "x", "version": "2"}, {"note": 3}])
    def test_bad_metadata(self, tmp_path: Path, metadata: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="metadata"):
            save_masks(tmp_path, {"w": random_mask(2, 4)}, metadata)

    def test_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="got none"):
            save_masks(tmp_path, {})

    def test_a_full_disk_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_masks(tmp_path, {"w": random_mask(4, 4)})
        before = (tmp_path / "masks.safetensors").read_bytes()

        def full(path: Path, *args: object) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(masks_module, "write_safetensors", full)
        with pytest.raises(OutputError, match="no space left on"):
            save_masks(tmp_path, {"w": random_mask(4, 4, seed=1)})
        assert (tmp_path / "masks.safetensors").read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1


class TestLoadRefuses:
    def test_missing(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "absent"):
            with pytest.raises(ModelError, match=r"(absent|masks\.safetensors) .*Name a run folder"):
                load_masks(path)

    def test_every_truncation(self, tmp_path: Path) -> None:
        save_masks(tmp_path, {"w": random_mask(8, 16), "v": random_mask(4, 4)})
        file = tmp_path / "masks.safetensors"
        whole = file.read_bytes()
        for length in [*range(0, 16), *range(16, len(whole), 7), len(whole) - 1]:
            file.write_bytes(whole[:length])
            with pytest.raises(ModelError, match=r"masks\.safetensors"):
                load_masks(tmp_path)

    @pytest.mark.parametrize(
        ("tensors", "metadata", "message"),
        [
            ({"w": [0]}, {}, "version 1, got None version None"),
            ({"w": [0]}, {**METADATA, "version": "2"}, "got 'proxsparse-masks' version '2'"),
            ({"w": [0]}, {**METADATA, "format": "pt"}, "got 'pt'"),
            ({"w": [0]}, METADATA, "JSON object of shapes"),
            ({"w": [0]}, {**METADATA, "shapes": "[]"}, "JSON object of shapes"),
            ({"w": [0]}, {**METADATA, "shapes": '{"w": 3}'}, "JSON object of shapes"),
            ({"w": [0]}, {**METADATA, "shapes": "{}"}, "a tensor without a shape for w"),
            ({"w": [0]}, {**METADATA, "shapes": '{"w": [4], "v": [4]}'}, "a shape without a tensor for v"),
            ({"w": [0]}, {**METADATA, "shapes": '{"w": [2, 6]}'}, r"blocks of 4 for w, got \(2, 6\)"),
            ({"w": [0]}, {**METADATA, "shapes": '{"w": []}'}, "blocks of 4 for w"),
            ({"w": [0]}, {**METADATA, "shapes": '{"w": [-1, 4]}'}, "blocks of 4 for w"),
            ({"w": [0]}, {**METADATA, "shapes": '{"w": [1.0, 4]}'}, "blocks of 4 for w"),
            ({"w": [0]}, {**METADATA, "shapes": '{"w": [4, 4]}'}, r"expected 2 uint8 values for w of shape \(4, 4\), got U8 \(1,\)"),
            ({"w": [0, 0]}, {**METADATA, "shapes": '{"w": [4]}'}, "expected 1 uint8 values"),
            ({"w": [215, 216]}, {**METADATA, "shapes": '{"w": [2, 12]}'}, "bytes below 216 for w, got 216"),
        ],
    )
    def test_tampering(self, tmp_path: Path, tensors: dict[str, list[int]], metadata: dict[str, str], message: str) -> None:
        file = tmp_path / "m.safetensors"
        save_file({name: np.array(values, dtype=np.uint8) for name, values in tensors.items()}, file, metadata)
        with pytest.raises(ModelError, match=message) as caught:
            load_masks(file)
        assert "\n" not in str(caught.value)

    def test_another_dtype(self, tmp_path: Path) -> None:
        save_file({"w": np.zeros(1, dtype=np.int16)}, tmp_path / "m", {**METADATA, "shapes": '{"w": [4]}'})
        with pytest.raises(ModelError, match="got I16"):
            load_masks(tmp_path / "m")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 3, bias=False)
        self.b = nn.Linear(8, 3, bias=False)
        self.c = nn.Linear(8, 3, bias=False)
        self.b.weight = self.a.weight


class TestApply:
    def test_pruned_slots_are_plus_zero_and_kept_bits_stay(self) -> None:
        model = nn.Linear(64, 16, bias=False)
        mask = random_mask(16, 64)
        with torch.no_grad():
            model.weight[~mask] = torch.tensor([-1.0, math.nan, -0.0, math.inf]).repeat(128)
            model.weight[mask] = torch.tensor([-0.0, math.nan]).repeat(256)
        before = model.weight.detach().clone().view(torch.int32)
        apply_masks(model, {"weight": mask})
        after = model.weight.detach().view(torch.int32)
        assert not after[~mask].any()
        assert torch.equal(after[mask], before[mask])
        apply_masks(model, {"weight": mask})
        assert torch.equal(model.weight.detach().view(torch.int32), after)
        assert model.weight.requires_grad

    def test_tied_parameters_under_any_name(self) -> None:
        for names in (["a.weight"], ["b.weight"], ["a.weight", "b.weight"]):
            model = Tied()
            apply_masks(model, dict.fromkeys(names, random_mask(3, 8)))
            assert model.a.weight is model.b.weight
            assert torch.equal(model.b.weight != 0, random_mask(3, 8))
            assert (model.c.weight != 0).all()

    @pytest.mark.parametrize(
        ("bad", "error", "message"),
        [
            ({f"x{i}.weight": random_mask(3, 8) for i in range(5)}, ModelError, "got 5 unknown: x0.weight, x1.weight, x2.weight. Use"),
            ({"c.weight": random_mask(2, 8)}, ShapeError, r"c\.weight in the weight's shape \(3, 8\), got \(2, 8\)"),
            ({"c.weight": torch.ones(3, 8, dtype=torch.bool)}, ShapeError, "got 4 in block"),
            ({"b.weight": random_mask(3, 8, seed=5)}, ModelError, "tied parameter b.weight"),
        ],
    )
    def test_nothing_is_applied_unless_all_fits(self, bad: dict[str, Tensor], error: type[Exception], message: str) -> None:
        model = Tied()
        with pytest.raises(error, match=message):
            apply_masks(model, {"a.weight": random_mask(3, 8), **bad})
        assert all((parameter != 0).all() for parameter in model.parameters())
