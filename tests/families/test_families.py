"""Every family that the package accepts, against oracles that take no shortcut, on tiny random models; docs/models.md tells the outcome.

A failure names the part and the family. `python -m pytest tests/families --write-models` writes the table of docs/models.md anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import page
from families.building import build, config_of, distance, logits, write_text, write_tokenizer
from families.configurations import FAMILIES, PUBLISHED, REFUSED
from families.oracle import gradients, learning, moved, not_wandas, text_gradients
from torch import Tensor, nn

from proxsparse_triton.errors import ProxSparseError
from proxsparse_triton.export import export_run, load_packed
from proxsparse_triton.formats.masks import load_masks
from proxsparse_triton.formats.verify import verify_folder
from proxsparse_triton.methods.wanda import Wanda
from proxsparse_triton.models.loading import load_model, resolve_model
from proxsparse_triton.models.selection import LayerPlan, plan_layers
from proxsparse_triton.pipeline import RunConfig, prune
from proxsparse_triton.training.batches import Batch
from proxsparse_triton.training.memory import meta_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EXACT = 1e-6  # of the logits: where sums change their order
GRADIENT = 1e-5  # of the layer's: sums in another order, through the whole model
PACKED = 1e-5  # another product, in fp32


@dataclass(frozen=True)
class Made:
    """A family's model, pruned by Wanda; what the method was given."""

    name: str
    original: Path
    run: Path
    plan: LayerPlan
    windows: tuple[Tensor, ...]
    masks: dict[str, Tensor]

    def dense(self) -> nn.Module:
        return load(self.original)


def load(folder: Path) -> nn.Module:
    return load_model(resolve_model(str(folder)), dtype=torch.float32)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_tokenizer(folder / "tokenizer")
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def found() -> page.Found:
    return page.Found()


def model_of(name: str, workshop: Path) -> Path:
    folder = workshop / name.replace(", ", "-").replace(" ", "-")
    build({**FAMILIES, **REFUSED}[name], folder / "model")
    shutil.copytree(workshop / "tokenizer", folder / "model", dirs_exist_ok=True)
    return folder


def pruned(folder: Path) -> None:
    text = str(folder.parent / "text.jsonl")
    prune(RunConfig(str(folder / "model"), folder / "run", "wanda", {}, text, samples=8, seqlen=32, evaluation_windows=2, device="cpu"))


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, workshop: Path, found: page.Found) -> Made:
    given = []
    with pytest.MonkeyPatch.context() as patch:
        once = Wanda.prune
        patch.setattr(Wanda, "prune", lambda self, task: given.append((task.plan, task.windows)) or once(self, task))
        folder = model_of(request.param, workshop)
        pruned(folder)
    ((plan, windows),) = given
    found.runs[request.param] = (folder / "model", folder / "run")
    return Made(request.param, folder / "model", folder / "run", plan, tuple(windows), load_masks(folder / "run"))


def test_masks(made: Made) -> None:
    """Those of Wanda by passes of the whole model."""
    wrong = not_wandas(made.dense(), made.plan, made.windows, made.masks)
    assert {name: count for name, count in wrong.items() if count} == {}
    assert set(wrong) == set(made.masks)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_learning(made: Made, training: bool) -> None:
    """The teacher is the dense model wherever the learned weights go, the student W0 under their mask."""
    model, dense, window, names = made.dense(), made.dense(), made.windows[0], list(made.masks)
    with learning(model, names, window, layer_weight=0.0) as prepared:
        masked = moved(model, names)
        for one in (model, dense, masked):
            one.train(training)
        student = distance(logits(model, window), logits(masked, window))
        with prepared.pretrained.teacher():
            taught = distance(logits(model, window), logits(dense, window))
    assert (student <= EXACT, taught <= EXACT) == (True, True), f"student off by {student:.2g}, teacher by {taught:.2g}"
    for name in names:
        model.get_parameter(name).data = dense.get_parameter(name).data
    assert distance(logits(model, window), logits(dense, window)) == 0  # nothing is left of it afterwards


def test_gradients(made: Made) -> None:
    """The gradient of a learned weight is that of W0 under the mask; the default loss has one too."""
    model, window, names = made.dense(), made.windows[0], list(made.masks)
    with learning(model, names, window, loss="ce") as prepared:
        masked = moved(model, names)
        prepared.loss(Batch(window[None], None)).backward()
    right = text_gradients(masked, names, window)
    largest = max(float(grad.norm()) for grad in right.values())
    sizes = {name: max(float(grad.norm()), 0.01 * largest) for name, grad in right.items()}
    off = {name: float((grad - right[name]).norm()) / sizes[name] for name, grad in gradients(model, names).items()}
    assert {name: error for name, error in off.items() if not error <= GRADIENT} == {}
    model = made.dense()
    with learning(model, names, window) as prepared:
        moved(model, names)
        prepared.loss(Batch(window[None], None)).backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model, names).values())
    assert any(grad.any() for grad in gradients(model, names).values())


def test_packed(made: Made, found: page.Found) -> None:
    """Loads with the logits of the run, or is refused at export."""
    out = made.run.parent / "packed"
    try:
        export_run(str(made.run), out, format="packed")
    except ProxSparseError as error:
        found.packed[made.name] = page.reason(error)
        return
    off = distance(logits(load_packed(out, device="cpu"), made.windows[0]), logits(load(made.run), made.windows[0]))
    shutil.rmtree(out)
    assert off <= PACKED
    found.packed[made.name] = ""


def test_share(made: Made, found: page.Found) -> None:
    """Of the weights in the decoder's matrices: by the plan, the manifest, and the files; and each layer verifies."""
    inside = [(n, p) for n, p in made.dense().named_parameters() if n.startswith(f"{made.plan.blocks}.") and p.dim() in (2, 3)]
    share = made.plan.share()
    assert share.total == sum(p.numel() for _, p in inside)
    assert share.pruned == sum(p.numel() for n, p in inside if n in made.masks)
    assert json.loads((made.run / "manifest.json").read_text())["decoder"] == share.as_json()
    report = verify_folder(made.run, original=made.original)
    assert report.problems == ()
    assert (report.decoder.pruned, report.decoder.total) == (share.pruned, share.total)
    found.shares[made.name] = share


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, workshop: Path, found: page.Found) -> None:
    said = REFUSED[name].refused
    with pytest.raises(ProxSparseError, match=re.escape(said)):
        pruned(model_of(name, workshop))
    found.refused[name] = said


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str, found: page.Found) -> None:
    family = PUBLISHED[name]
    found.published[name] = plan_layers(meta_model(config_of(family), torch.bfloat16)).share()
    assert found.published[name].warning


def test_fresh_process(found: page.Found) -> None:
    """transformers alone loads every run that was made: no tensor missing or unexpected, logits of the original under its masks."""
    given = json.dumps({name: [str(original), str(run)] for name, (original, run) in found.runs.items()})
    done = subprocess.run([sys.executable, Path(__file__).with_name("fresh.py")], input=given, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)
    assert set(answers) == set(found.runs)
    assert {name: problem for name, problem in answers.items() if problem} == {}


def test_page(found: page.Found, request: pytest.FixtureRequest) -> None:
    """docs/models.md says what was found."""
    if request.config.getoption("--write-models", default=False):
        page.write(found)
    stated = page.read()
    assert {name: stated.get(name) for name in found.rows()} == found.rows()
