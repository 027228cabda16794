import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from proxsparse_triton.errors import ModelError
from proxsparse_triton.formats.dense import write_pruned_model
from proxsparse_triton.formats.manifest import write_manifest
from proxsparse_triton.formats.masks import save_masks
from proxsparse_triton.formats.records import changed_files, file_records
from proxsparse_triton.formats.shards import model_files
from proxsparse_triton.formats.verify import LayerReport, verify_folder

ASSET = Path(__file__).parents[2] / "proxsparse_triton" / "assets" / "pylm-2m"
LAYER = "model.layers.1.mlp.up_proj.weight"


def mask_of(weight: Tensor) -> Tensor:
    scores = weight.abs().float().unflatten(-1, (-1, 4))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2, dim=-1).indices, True).flatten(-2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pylm-2m pruned by magnitude, as a run writes it."""
    out = tmp_path_factory.mktemp("run") / "run"
    state = load_file(ASSET / "model.safetensors")
    masks = {name: mask_of(weight) for name, weight in state.items() if ".self_attn." in name or ".mlp." in name}
    write_pruned_model(ASSET, model_files(ASSET), out, masks, config_entry={})
    save_masks(out, masks)
    write_manifest(out, {"parameters": list(masks), "weights_updated": False})
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def foreign(run: Path) -> Path:
    """The same weights without our records: a third party's checkpoint."""
    (run / "masks.safetensors").unlink()
    (run / "manifest.json").unlink()
    return run


def edit(run: Path, name: str, change: object) -> None:
    state = load_file(run / "model.safetensors")
    change(state[name])  # type: ignore[operator]
    save_file(state, run / "model.safetensors", {"format": "pt"})


def slot(run: Path, kept: bool) -> tuple[int, int]:
    """A place in LAYER that its mask keeps or prunes; kept ones are not zero."""
    w = load_file(run / "model.safetensors")[LAYER]
    row, column = ((w != 0) == kept).nonzero()[7].tolist()
    return row, column


def layer(report: object) -> LayerReport:
    return next(found for found in report.layers if found.name == LAYER)  # type: ignore[attr-defined]


def test_a_good_run(finished: Path) -> None:
    report = verify_folder(finished, original=ASSET)
    assert report.ok
    assert report.masks
    assert len(report.layers) == 28
    found = layer(report)
    assert dataclasses.replace(found, zeros=0.5) == LayerReport(LAYER, (512, 192), True, 24576, 0, 0, 0.5, 0, 0, "")
    assert 0.5 <= found.zeros < 0.51
    json.dumps(dataclasses.asdict(report))


def test_without_the_original(finished: Path) -> None:
    report = verify_folder(finished)
    assert report.ok
    assert report.original is None
    assert {found.changed for found in report.layers} == {None}


def test_a_weight_in_a_pruned_slot(run: Path) -> None:
    edit(run, LAYER, lambda w: w.__setitem__(slot(run, kept=False), 0.5))
    report = verify_folder(run)
    assert report.problems == (f"{LAYER}: 1 of 24576 blocks keep more than 2 of 4 weights; 1 pruned weights are not +0.0",)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-38])
def test_odd_values_in_a_pruned_slot_count_as_weights(run: Path, value: float) -> None:
    edit(run, LAYER, lambda w: w.__setitem__(slot(run, kept=False), value))
    assert layer(verify_folder(run)).wrong_blocks == 1


def test_a_negative_zero_in_a_pruned_slot(run: Path) -> None:
    edit(run, LAYER, lambda w: w.__setitem__(slot(run, kept=False), -0.0))
    report = verify_folder(run)
    assert report.problems == (f"{LAYER}: 1 pruned weights are not +0.0",)
    assert layer(report).negative_zeros == 1
    assert layer(report).wrong_blocks == 0
    # In somebody else's checkpoint it is counted, but the weights are 2:4 all the same.
    report = verify_folder(foreign(run))
    assert report.ok
    assert layer(report).negative_zeros == 1


def test_a_changed_kept_weight_needs_the_original_to_be_seen(run: Path) -> None:
    edit(run, LAYER, lambda w: w.__setitem__(slot(run, kept=True), 7.0))
    assert verify_folder(run).ok
    report = verify_folder(run, original=ASSET)
    assert report.problems == (f"{LAYER}: 1 kept weights differ from the original",)
    assert layer(report).changed == 1
    write_manifest(run, {"weights_updated": True})
    report = verify_folder(run, original=ASSET)
    assert report.ok
    assert report.weights_updated
    assert layer(report).changed == 1


def test_a_mask_that_moved(run: Path) -> None:
    masks = {
        name: mask_of(weight) for name, weight in load_file(ASSET / "model.safetensors").items() if ".self_attn." in name or ".mlp." in name
    }
    masks[LAYER] = ~masks[LAYER]
    save_masks(run, masks)
    report = verify_folder(run)
    assert layer(report).wrong_blocks == 0
    assert "pruned weights are not +0.0" in report.problems[0]


@pytest.mark.parametrize("updated", [False, True])
def test_a_tensor_that_nothing_prunes_was_changed(run: Path, updated: bool) -> None:
    edit(run, "model.norm.weight", lambda w: w.__setitem__(0, 7.0))
    write_manifest(run, {"weights_updated": updated})
    assert verify_folder(run, original=ASSET).problems == ("model.norm.weight: differs from the original, though it is not pruned",)


def test_a_lost_tensor(run: Path) -> None:
    state = load_file(run / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, run / "model.safetensors")
    assert verify_folder(run).ok
    assert verify_folder(run, original=ASSET).problems == ("model.norm.weight: is missing, the original has it",)


def test_another_model_as_original(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ASSET, other)
    state = load_file(other / "model.safetensors")
    save_file({name: weight.float() for name, weight in state.items()}, other / "model.safetensors")
    report = verify_folder(run, original=other)
    assert f"{LAYER}: is stored in another shape or dtype than the original" in report.problems
    save_file({"x": torch.zeros(1)}, other / "model.safetensors")
    with pytest.raises(ModelError, match="verify --original: expected every"):
        verify_folder(run, original=other)


class TestForeign:
    def test_a_pruned_checkpoint(self, run: Path) -> None:
        report = verify_folder(foreign(run), original=ASSET)
        assert report.ok
        assert not report.masks
        assert len(report.layers) == 28
        assert not any("embed" in found.name for found in report.layers)
        assert layer(report).not_zeroed is None

    def test_a_dense_checkpoint(self) -> None:
        report = verify_folder(ASSET)
        assert report.problems[0] == "not one layer that is 2:4"
        assert len(report.problems) == 29

    def test_one_dense_layer_in_a_block_fails(self, run: Path) -> None:
        edit(foreign(run), LAYER, lambda w: w.fill_(1.0))
        assert verify_folder(run).problems == (f"{LAYER}: 24576 of 24576 blocks keep more than 2 of 4 weights",)

    def test_which_matrices_count(self, tmp_path: Path) -> None:
        dense, sparse = torch.ones(4, 8), torch.tensor([[1.0, 0, 0, 2] * 2] * 4)
        ignored = ["model.embed_tokens", "transformer.wte", "transformer.wpe", "lm_head", "embed_out", "shared", "model.layers.0.mlp.gate"]
        state = {f"{name}.weight": dense.clone() for name in [*ignored, "project_in"]}
        state |= {f"model.layers.{i}.mlp.{name}.weight": sparse.clone() for i, name in enumerate(["shared_expert.up_proj", "gate_proj"])}
        state |= {"model.layers.0.odd.weight": torch.ones(4, 6), "model.layers.0.norm.weight": torch.ones(8)}
        state |= {
            "model.layers.0.packed.qweight": torch.ones(4, 8, dtype=torch.int32),
            "model.layers.0.fp8.weight": sparse.to(torch.float8_e4m3fn),
        }
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        report = verify_folder(tmp_path)
        assert report.ok
        assert {found.name: (found.required, found.wrong_blocks) for found in report.layers} == {
            "project_in.weight": (False, 8),
            "model.layers.0.mlp.shared_expert.up_proj.weight": (True, 0),
            "model.layers.1.mlp.gate_proj.weight": (True, 0),
            "model.layers.0.fp8.weight": (True, 0),
        }

    def test_nothing_to_check(self, tmp_path: Path) -> None:
        save_file({"model.embed.weight": torch.ones(4, 8)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        assert verify_folder(tmp_path).problems == ("not one layer that is 2:4",)


class TestBrokenFolders:
    def test_not_a_model(self, tmp_path: Path) -> None:
        for path in (tmp_path / "absent", tmp_path):
            with pytest.raises(ModelError, match="verify: expected"):
                verify_folder(path)

    def test_corrupt_files(self, run: Path) -> None:
        masks, weights = run / "masks.safetensors", run / "model.safetensors"
        whole = masks.read_bytes()
        masks.write_bytes(whole[:-1])
        with pytest.raises(ModelError, match=r"masks\.safetensors"):
            verify_folder(run)
        masks.write_bytes(whole)
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            verify_folder(run)

    def test_records_that_disagree(self, run: Path) -> None:
        write_manifest(run, {"parameters": [LAYER]})
        with pytest.raises(ModelError, match="got 27 in only one of them"):
            verify_folder(run)
        write_manifest(run, {"parameters": "all"})
        with pytest.raises(ModelError, match="list of names under parameters"):
            verify_folder(run)

    def test_the_manifest_s_list_without_masks(self, run: Path) -> None:
        (run / "masks.safetensors").unlink()
        write_manifest(run, {"parameters": [LAYER]})
        assert [found.name for found in verify_folder(run).layers] == [LAYER]
        write_manifest(run, {"parameters": ["gone.weight"]})
        with pytest.raises(ModelError, match=r"without a key of their own: gone\.weight"):
            verify_folder(run)

    def test_masks_of_another_shape(self, run: Path) -> None:
        write_manifest(run, {})
        save_masks(run, {LAYER: mask_of(torch.rand(4, 8))})
        with pytest.raises(ModelError, match=r"weight's shape \(512, 192\), got \(4, 8\)"):
            verify_folder(run)


def test_a_run_whose_weights_were_changed_is_known_by_its_hashes(run: Path) -> None:
    """Where kept weights are the method's own there is no original to compare them with."""
    manifest = json.loads((run / "manifest.json").read_text())
    write_manifest(run, {**manifest, "weights_updated": True, "files": file_records(run)})
    assert verify_folder(run).ok
    path = run / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    problem = "model.safetensors: is not the file that was written, its SHA-256 in manifest.json is another"
    assert problem in verify_folder(run).problems
    (run / "masks.safetensors").write_bytes(b"")
    manifest = json.loads((run / "manifest.json").read_text())
    assert changed_files(run, manifest) == ["masks.safetensors" + problem.removeprefix("model.safetensors"), problem]
    (run / "masks.safetensors").unlink()
    assert changed_files(run, manifest)[0] == "masks.safetensors: is missing, manifest.json lists it"
    assert changed_files(run, {}) == []
