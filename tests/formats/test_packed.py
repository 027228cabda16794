import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packing import ASSET, edit_json, magnitude_run, opened, pack, rehash, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from proxsparse_triton.errors import ConfigError, ModelError, OutputError, ProxSparseError, ShapeError
from proxsparse_triton.formats import packed as packed_module
from proxsparse_triton.formats.folder import output_folder
from proxsparse_triton.formats.masks import load_masks
from proxsparse_triton.formats.packed import is_packed_folder, read_packed, write_packed_model
from proxsparse_triton.formats.shards import bits, read_header
from proxsparse_triton.formats.verify import verify_folder

LAYER = "model.layers.0.mlp.up_proj"
SHARD = "packed-00001-of-00001.safetensors"
INDEX = "packed.safetensors.index.json"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return magnitude_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def packed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(run, tmp_path_factory.mktemp("packed") / "packed")


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A packed folder to damage."""
    return Path(shutil.copytree(packed, tmp_path / "packed"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pylm-2m in three shards, written by transformers, then pruned."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(ASSET).save_pretrained(folder / "dense", max_shard_size="1800KB")
    return magnitude_run(folder / "run", folder / "dense")


def assert_same(packed: Path, dense: dict[str, Tensor]) -> None:
    """Bit for bit, under the same names."""
    model = read_packed(packed)
    assert set(model.shapes) == set(dense)
    for name, tensor in dense.items():
        found = model.tensor(name)
        assert model.shapes[name] == tuple(tensor.shape) == tuple(found.shape)
        assert found.dtype == tensor.dtype
        assert torch.equal(bits(found), bits(tensor)), name


class TestRoundTrip:
    def test_the_trained_model(self, run: Path, packed: Path) -> None:
        assert_same(packed, tensors_of(run))
        masks, found = load_masks(run), read_packed(packed).masks
        assert len(masks) == 28
        assert list(found) == list(masks)
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())

    def test_what_the_folder_holds(self, run: Path, packed: Path) -> None:
        assert {path.name for path in packed.iterdir()} == {
            *("config.json", "manifest.json", SHARD, INDEX, "tokenizer.json", "tokenizer_config.json", "training.json"),
        }
        for name in ("tokenizer.json", "tokenizer_config.json", "training.json"):
            assert (packed / name).read_bytes() == (run / name).read_bytes()
        stored, dense = load_file(packed / SHARD), tensors_of(run)
        others = {name for name in dense if f"{name.removesuffix('.weight')}.values" not in stored}
        assert len(stored) == 2 * 28 + len(others)
        assert len(others) == len(dense) - 28
        assert all(torch.equal(bits(stored[name]), bits(dense[name])) for name in others)
        assert (stored[f"{LAYER}.values"].shape, stored[f"{LAYER}.values"].dtype) == ((512, 96), torch.bfloat16)
        assert (stored[f"{LAYER}.metadata"].shape, stored[f"{LAYER}.metadata"].dtype) == ((512, 12), torch.int16)
        assert json.loads((packed / INDEX).read_text())["weight_map"] == dict.fromkeys(stored, SHARD)

    def test_nine_sixteenths(self, run: Path, packed: Path) -> None:
        stored, dense = load_file(packed / SHARD), tensors_of(run)
        layers = read_packed(packed).layers
        after = sum(stored[f"{name}.{part}"].nbytes for name in layers for part in ("values", "metadata"))
        assert 16 * after == 9 * sum(dense[f"{name}.weight"].nbytes for name in layers)

    def test_config_and_manifest(self, run: Path, packed: Path) -> None:
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (run, packed))
        entry = after.pop("proxsparse")
        assert {**before.pop("proxsparse"), "format": "packed", "format_version": 1} == {k: v for k, v in entry.items() if k != "layers"}
        assert after == before
        assert len(entry["layers"]) == 28
        assert entry["layers"][LAYER] == [512, 192]
        manifest = json.loads((packed / "manifest.json").read_text())
        assert set(manifest["files"]) == {path.name for path in packed.iterdir()} - {"manifest.json"}
        assert manifest["files"][SHARD]["bytes"] == (packed / SHARD).stat().st_size
        assert manifest["version"]

    def test_shards_stay_shards(self, sharded: Path, tmp_path: Path) -> None:
        packed = pack(sharded, tmp_path / "packed")
        assert sorted(path.name for path in packed.glob("*.safetensors")) == [f"packed-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        assert_same(packed, tensors_of(sharded))

    def test_pickles(self, run: Path, tmp_path: Path) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        shutil.copy(run / "config.json", folder)
        shutil.copy(run / "masks.safetensors", folder)
        torch.save(tensors_of(run), folder / "pytorch_model.bin")
        assert_same(pack(folder, tmp_path / "packed"), tensors_of(run))

    def test_without_masks_the_non_zeros_stay(self, run: Path, packed: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(run, tmp_path / "run"))
        (folder / "masks.safetensors").unlink()
        assert_same(pack(folder, tmp_path / "packed"), tensors_of(run))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("width", [4, 12, 36])  # a row of metadata ends inside a word
    def test_dtypes_and_odd_values(self, tmp_path: Path, dtype: torch.dtype, width: int) -> None:
        """Fewer than two non-zeros, NaN, infinity, -0.0 beside +0.0, and tensors of odd sizes between the layers."""
        w = torch.zeros(5, width, dtype=dtype)
        w[:, ::4], w[1:, 1::4] = 1.5, torch.arange(1, 5, dtype=dtype)[:, None]
        w[1, 2], w[1, 1], w[2, 0], w[3, :2] = math.nan, 0.0, -math.inf, -0.0
        state = {"b.w.weight": w, "a": torch.ones(3, dtype=torch.uint8), "c": torch.randn(3), "b.w.bias": torch.randn(5).to(dtype)}
        folder = plain_folder(tmp_path / "dense", state)
        found = read_packed(pack(folder, tmp_path / "packed", ("b.w.weight",))).tensor("b.w.weight")
        assert torch.equal(bits(found), bits(w))
        entries = read_header(tmp_path / "packed" / SHARD).entries
        assert {"a", "c", "b.w.bias", "b.w.values", "b.w.metadata"} == {entry.name for entry in entries}
        assert torch.equal(load_file(tmp_path / "packed" / SHARD)["c"], state["c"])

    def test_kept_zeros_of_a_mask(self, run: Path, tmp_path: Path) -> None:
        """A weight that the mask keeps stays kept when it is zero, -0.0 included."""
        folder = Path(shutil.copytree(run, tmp_path / "run"))
        state, mask = tensors_of(run), load_masks(run)[f"{LAYER}.weight"]
        first, second = mask[0].nonzero()[:2, 0].tolist()
        state[f"{LAYER}.weight"][0, first], state[f"{LAYER}.weight"][0, second] = 0.0, -0.0
        save_file(state, folder / "model.safetensors")
        packed = pack(folder, tmp_path / "packed")
        assert_same(packed, state)
        assert torch.equal(read_packed(packed).masks[f"{LAYER}.weight"], mask)

    def test_equal_folders_give_equal_weights(self, run: Path, packed: Path, tmp_path: Path) -> None:
        again = pack(run, tmp_path / "packed")
        for name in (SHARD, INDEX, "config.json"):
            assert (again / name).read_bytes() == (packed / name).read_bytes()


def plain_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file(state, folder / "model.safetensors")
    return folder


W = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]] * 3)


class TestWritingRefuses:
    @pytest.mark.parametrize(
        ("state", "layer", "error", "message"),
        [
            ({"m.weight": W + torch.eye(3, 8)}, "m.weight", ModelError, r"got 3 in block \(1, 0\) of m\.weight \(2 blocks have more\)"),
            ({"m.weight": W.int()}, "m.weight", ModelError, "at least 16 bits, got I32"),
            ({"m.weight": W.to(torch.float8_e4m3fn)}, "m.weight", ModelError, "at least 16 bits, got F8_E4M3"),
            ({"m.weight": W[:, :6].contiguous()}, "m.weight", ShapeError, r"export \(m.weight\): .* divisible by 4"),
            ({"m.weight": W[None].contiguous()}, "m.weight", ModelError, r"linear layer .* got F32 \(1, 3, 8\)"),
            ({"m.kernel": W}, "m.kernel", ModelError, "linear layer"),
            ({"m.weight": W, "m.values": W.clone()}, "m.weight", ModelError, "one tensor under each name, got several called m.values"),
            ({"m.weight": W}, "n.weight", ModelError, "got 1 without a key of their own: n.weight"),
        ],
    )
    def test_what_cannot_be_packed(
        self, tmp_path: Path, state: dict[str, Tensor], layer: str, error: type[Exception], message: str
    ) -> None:
        folder = plain_folder(tmp_path / "dense", state)
        with pytest.raises(error, match=message) as caught:
            pack(folder, tmp_path / "packed", (layer,))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "packed" / "manifest.json").exists()

    def test_weights_that_the_masks_prune(self, run: Path, tmp_path: Path) -> None:
        """Packing them would lose them without a word."""
        folder = Path(shutil.copytree(run, tmp_path / "run"))
        state, mask = tensors_of(run), load_masks(run)[f"{LAYER}.weight"]
        column = int((~mask[3]).nonzero()[-1])
        state[f"{LAYER}.weight"][3, column] = 1.0
        save_file(state, folder / "model.safetensors")
        with pytest.raises(ModelError, match=rf"got 1 non-zero weights in {LAYER}.weight, the first in block \(3, {column // 4}\)"):
            pack(folder, tmp_path / "packed")

    def test_masks_of_another_shape(self, run: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(run, tmp_path / "run"))
        state = tensors_of(run)
        state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"][:, :8].contiguous()
        save_file(state, folder / "model.safetensors")
        with pytest.raises(ModelError, match=rf"mask of {LAYER}.weight in the weight's shape \(512, 8\), got \(512, 192\)"):
            pack(folder, tmp_path / "packed")

    def test_masks_and_manifest_that_differ(self, run: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(run, tmp_path / "run"))
        edit_json(folder / "manifest.json", parameters=[f"{LAYER}.weight"])
        with pytest.raises(ModelError, match=r"export: expected the same layers .* got 27 in only one of them"):
            opened(folder)

    def test_the_original_is_never_the_output(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(run)
        with pytest.raises(OutputError, match="output folder of its own"):
            pack(run, tmp_path / "link")

    def test_records_are_json(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="finite numbers, got nan at x"):
            write_packed_model(opened(run), tmp_path / "packed", record={"x": math.nan})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
def test_an_interrupted_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException]
) -> None:
    pack_24 = packed_module.pack_24
    calls = []

    def fail_later(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        if len(calls) == 5:
            raise error
        return pack_24(*arguments)

    monkeypatch.setattr(packed_module, "pack_24", fail_later)
    with pytest.raises(expected), output_folder(tmp_path / "packed") as out:
        pack(run, out)
    assert len(calls) == 5
    assert not list(tmp_path.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit_entry(folder: Path, **changes: object) -> None:
    entry = json.loads((folder / "config.json").read_text())["proxsparse"]
    edit_json(folder / "config.json", proxsparse={**entry, **changes})
    rehash(folder)


def edit_shard(folder: Path, change: Callable[[dict[str, Tensor]], object], *, index: bool = True) -> None:
    state = load_file(folder / SHARD)
    change(state)
    save_file(state, folder / SHARD)
    if index:
        edit_json(folder / INDEX, weight_map=dict.fromkeys(state, SHARD))
    rehash(folder)


def without_manifest_entry(folder: Path, name: str) -> None:
    (folder / name).unlink()
    rehash(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard absent": (lambda f: (f / SHARD).unlink(), rf"the 6 files that manifest.json lists, got 1 missing: {SHARD}"),
    "shard absent, and in the manifest": (
        lambda f: without_manifest_entry(f, SHARD),
        rf"shards that {INDEX} names, got 1 missing: {SHARD}",
    ),
    "shard cut": (lambda f: cut(f / SHARD), rf"{SHARD}: expected \d+ bytes as manifest.json says, got \d+"),
    "shard changed": (lambda f: flip(f / SHARD), rf"{SHARD}: expected SHA-256 \w+\.\.\. as manifest.json says, got \w+\.\.\."),
    "tokenizer changed": (lambda f: flip(f / "tokenizer.json"), r"tokenizer.json: expected SHA-256"),
    "config changed": (lambda f: edit_json(f / "config.json", rms_norm_eps=1e-5), r"config.json: expected \d+ bytes"),
    "index absent": (lambda f: (f / INDEX).unlink(), rf"got 1 missing: {INDEX}"),
    "manifest absent": (lambda f: (f / "manifest.json").unlink(), "manifest.json: expected a JSON file, got no such file"),
    "manifest of another tool": (lambda f: edit_json(f / "manifest.json", tool="x"), "expected a manifest of proxsparse-triton"),
    "manifest without hashes": (lambda f: edit_json(f / "manifest.json", files={}), "sizes and hashes under files in manifest.json"),
    "manifest that leads outside": (
        lambda f: edit_json(f / "manifest.json", files={"../x": {"bytes": 1, "sha256": ""}}),
        "sizes and hashes under files",
    ),
    "another version": (lambda f: edit_entry(f, format_version=2), "version 1 of the packed format, got 2. Update"),
    "no layers": (lambda f: edit_entry(f, layers={}), "the packed layers in config.json, got none"),
    "odd layers": (lambda f: edit_entry(f, layers={LAYER: [512, 191]}), rf"for the packed layer {LAYER} in config.json, got \[512, 191\]"),
    "layers of another shape": (
        lambda f: edit_entry(f, layers={LAYER: [512, 256]}),
        rf"{LAYER}.values as F64 or F32 or F16 or BF16 \(512, 128\), got BF16 \(512, 96\). The weights belong to another config.json",
    ),
    "layers that are not there": (lambda f: edit_entry(f, layers={"model.x": [8, 8]}), r"expected model.x.values as .*, got none"),
    "no metadata": (lambda f: edit_shard(f, lambda s: s.pop(f"{LAYER}.metadata")), rf"{LAYER}.metadata as I16 \(512, 12\), got none"),
    "metadata of another type": (
        lambda f: edit_shard(f, lambda s: s.update({f"{LAYER}.metadata": s[f"{LAYER}.metadata"].int()})),
        r"metadata as I16 \(512, 12\), got I32",
    ),
    "an index of other tensors": (
        lambda f: edit_shard(f, lambda s: s.pop("model.norm.weight"), index=False),
        rf"the tensors that {INDEX} names, got others",
    ),
}


class TestReadingRefuses:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_damage(self, copy: Path, kind: str) -> None:
        damage, message = DAMAGE[kind]
        damage(copy)
        with pytest.raises(ModelError, match=message) as caught:
            read_packed(copy)
        assert "\n" not in str(caught.value)

    def test_what_is_no_packed_folder(self, run: Path, tmp_path: Path) -> None:
        for path, message in (
            (run, "got a model of another kind. Load it with AutoModelForCausalLM.from_pretrained, or pack it"),
            (tmp_path, "got one that has no config.json"),
            (tmp_path / "absent", "got one that does not exist"),
            (run / "config.json", "got one that is a file"),
        ):
            with pytest.raises(ModelError, match=message):
                read_packed(path)
        assert not is_packed_folder(run)
        assert not is_packed_folder(tmp_path)

    def test_hashes_may_be_left_out(self, copy: Path) -> None:
        """An edited tokenizer is the user's business then; a cut shard is found all the same."""
        edit_json(copy / "tokenizer_config.json", added=1)
        with pytest.raises(ModelError, match="The file was cut or changed"):
            read_packed(copy)
        assert len(read_packed(copy, verify_hashes=False).layers) == 28
        cut(copy / SHARD)
        with pytest.raises(ModelError, match="truncated"):
            read_packed(copy, verify_hashes=False)

    def test_positions_that_do_not_ascend(self, copy: Path) -> None:
        edit_shard(copy, lambda state: state[f"{LAYER}.metadata"][2, 3].fill_(0))
        packed = read_packed(copy)
        with pytest.raises(ModelError, match=rf"well-formed metadata in {LAYER}, got positions .* block \(2, 12\)"):
            packed.tensor(f"{LAYER}.weight")


class TestVerify:
    def test_a_good_folder(self, packed: Path) -> None:
        report = verify_folder(packed, original=ASSET)
        assert report.ok
        assert len(report.layers) == 28
        assert all(layer.zeros == 0.5 and layer.changed == 0 and layer.wrong_blocks == 0 for layer in report.layers)

    def test_kept_weights_that_differ_from_the_original(self, copy: Path) -> None:
        """Also one that became zero, which a dense folder without masks could not show."""
        edit_shard(copy, lambda state: state[f"{LAYER}.values"][0, :2].copy_(torch.tensor([0.0, 7.0])))
        edit_shard(copy, lambda state: state["model.norm.weight"].add_(1))
        assert verify_folder(copy).ok
        report = verify_folder(copy, original=ASSET)
        assert report.problems == (
            f"{LAYER}.weight: 2 kept weights differ from the original",
            "model.norm.weight: differs from the original, though it is not pruned",
        )

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: flip(f / SHARD), "SHA-256"),
            (lambda f: edit_shard(f, lambda state: state[f"{LAYER}.metadata"].fill_(0)), f"metadata in {LAYER}"),
        ],
    )
    def test_damage(self, copy: Path, damage: Callable[[Path], object], message: str) -> None:
        damage(copy)
        with pytest.raises(ProxSparseError, match=message):
            verify_folder(copy)
