"""Predictions: figures that can be checked by hand, decisions, advice; and that no weight is read for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from proxsparse_triton import pipeline, planning
from proxsparse_triton.errors import ConfigError, ModelError
from proxsparse_triton.methods.proxsparse import ProxSparse
from proxsparse_triton.pipeline import RunConfig
from proxsparse_triton.planning import GPUS, MemoryPlan, plan_run, predict
from proxsparse_triton.training import memory
from proxsparse_triton.training.pretrained import compact, kept_dtype

ASSET = Path(__file__).parents[1] / "proxsparse_triton" / "assets" / "pylm-2m"
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=4096
)
QWEN_14B = Qwen2Config(
    vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8
)
GIB = 2**30


def plan_of(config: Any, dtype: torch.dtype = torch.bfloat16, *, settings: ProxSparse | None = None, **options: Any) -> MemoryPlan:
    return predict(config, dtype, settings or ProxSparse(recipe="paper", lambda2=0.25), 4096, **options)


def test_llama_2_7b() -> None:
    """6.74 B parameters, 6.48 B of them pruned: by hand what stays; checkpointed, the gradients are the highest point."""
    plan = plan_of(LLAMA_2_7B, limit=80 * 10**9, device_name="NVIDIA H200")
    assert (plan.settings.weight_bits, plan.settings.moments, plan.settings.checkpointing) == (16, "bfloat16", True)
    assert plan.items["weights"] == pytest.approx(2 * 6.738e9, rel=1e-3)
    assert plan.items["moments"] == pytest.approx(4 * 6.738e9, rel=1e-3)
    assert plan.items["pretrained"] == pytest.approx(2 * 6.476e9, rel=1e-3)
    assert plan.items["residual"] == 0
    assert plan.items["gradients"] == pytest.approx(2 * 6.6e9, rel=0.03)
    assert plan.items["activations"] < 3e9
    assert plan.peak == sum(plan.items.values()) <= 80e9
    assert plan.steps == 400
    assert plan.seconds is not None
    assert 60 < plan.seconds < 600


def test_four_blocks_of_llama_2_7b_by_the_recipe_auto() -> None:
    """W0 without lambda2, moments of what is pruned alone, two passes; a step also has the teacher's forward pass."""
    config = LlamaConfig(**{**LLAMA_2_7B.to_dict(), "num_hidden_layers": 4})
    options: dict[str, Any] = {"device_name": "NVIDIA H200"}
    paper = plan_of(config, settings=ProxSparse(recipe="paper", moments="bfloat16", checkpointing=True), **options)
    auto = plan_of(config, settings=ProxSparse(moments="bfloat16", checkpointing=True), **options)
    pruned, others = 4 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 9 * 4096
    assert auto.items["weights"] == pytest.approx(2 * (pruned + others), rel=1e-5)
    assert (auto.items["moments"], auto.items["pretrained"]) == (4 * pruned, 2 * pruned)
    assert (paper.items["moments"], paper.items["pretrained"]) == (4 * (pruned + others), 0)
    # at the highest point, the first block's backward pass: that of the head is already there, that of the embeddings not yet
    assert paper.items["gradients"] - auto.items["gradients"] == pytest.approx(2 * 32000 * 4096, rel=1e-3)
    assert (paper.steps, auto.steps) == (400, 800)
    assert auto.seconds is not None
    assert paper.seconds is not None
    # with checkpointing 5 units instead of 4: the teacher, forward, forward again, and backward
    assert 1.1 < auto.seconds / auto.steps / (paper.seconds / paper.steps) < 1.35


@pytest.mark.parametrize(
    ("settings", "samples", "steps"),
    [({}, 100, 400), ({}, 799, 1598), ({}, 800, 800), ({"batch_size": 8}, 400, 100), ({"steps": 37}, 400, 37), ({"epochs": 1}, 9, 9)],
)
def test_passes_are_planned(settings: dict[str, Any], samples: int, steps: int) -> None:
    tiny = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=112, num_hidden_layers=1, num_attention_heads=4)
    assert predict(tiny, torch.float32, ProxSparse(**settings), 16, samples=samples).steps == steps


def test_qwen_14b_fits_into_139_gib() -> None:
    plan = plan_of(QWEN_14B, limit=139 * GIB)
    assert plan.settings.moments == "int8"
    assert memory.fits(plan.peak, 139 * GIB)


def test_settings_that_are_given_stay() -> None:
    settings = ProxSparse(recipe="paper", weight_bits=32, moments="float32", checkpointing=False)
    plan = plan_of(LLAMA_2_7B, settings=settings, limit=80 * 10**9)
    assert plan.settings == settings
    assert plan.items["residual"] == pytest.approx(2 * 6.476e9, rel=1e-3)
    assert plan.items["pretrained"] == 0
    assert plan.peak > 100e9


def test_batches_steps_and_layers() -> None:
    """Activations grow with the batch, steps shrink; only selected layers keep a W0."""
    tiny = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=112, num_hidden_layers=4, num_attention_heads=4)
    one = predict(tiny, torch.float32, ProxSparse(lambda2=1.0, epochs=2), 64, samples=9)
    four = predict(tiny, torch.float32, ProxSparse(lambda2=1.0, epochs=2), 64, 4, samples=9)
    assert (one.steps, four.steps, four.settings.batch_size) == (18, 6, 4)
    assert four.items["activations"] > 3 * one.items["activations"]
    mlp = predict(tiny, torch.float32, ProxSparse(lambda2=1.0), 64, skip=["attn"], stored=torch.bfloat16)
    assert mlp.items["pretrained"] == 2 * 4 * 3 * 64 * 112
    with pytest.raises(ConfigError, match="--include"):
        predict(tiny, torch.float32, ProxSparse(), 64, include=["nothing"])


def test_time_is_only_told_for_known_gpus() -> None:
    tiny = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4)
    seconds = {}
    for name in (None, "Some GPU of 2040", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe"):
        for dtype in (torch.bfloat16, torch.float32):
            seconds[name, dtype] = predict(tiny, dtype, ProxSparse(), 64, device_name=name).seconds
    assert seconds[None, torch.float32] is seconds["Some GPU of 2040", torch.bfloat16] is None
    h100, pcie, a100 = (seconds[name, torch.bfloat16] for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB"))
    assert h100 < pcie < a100  # type: ignore[operator]
    assert seconds["NVIDIA H100 PCIe", torch.float32] > pcie  # type: ignore[operator]
    assert all(tflops > 0 and bandwidth > 0 for tflops, bandwidth in GPUS.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        ProxSparse(lambda2=0.25, checkpointing=True, lambda1=0.1, lr=1e-4),
        ProxSparse(checkpointing=False, lambda1=0.1, lr=1e-4, weight_bits=32, moments="float32"),
        ProxSparse(lambda2=0.25, checkpointing=True, lambda1=0.1, lr=1e-4, moments="int8", clip_mode="none"),
    ],
)
def test_the_peak_of_a_real_run(settings: ProxSparse) -> None:
    """Within 10 % of what the allocator counts over three steps of learning."""
    from transformers import LlamaForCausalLM

    from proxsparse_triton.methods.base import PruneTask
    from proxsparse_triton.models.selection import plan_layers

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=8
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    windows = tuple(torch.randint(32000, (2048,)) for _ in range(3))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    settings.prune(PruneTask(model, plan_layers(model), windows))
    planned = predict(config, torch.bfloat16, settings, 2048)
    assert planned.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def run(tmp_path: Path, **changes: Any) -> RunConfig:
    return RunConfig(**{"model": "demo", "output": tmp_path / "run", "device": "cpu", **changes})


@pytest.mark.parametrize(
    ("repair", "steps", "more"),
    [("both", None, 400), ("finetune", 70, 70), ("least-squares", None, 0)],
    ids=["both", "finetune", "least squares"],
)
def test_repair_is_planned_too(repair: str, steps: int | None, more: int, tmp_path: Path) -> None:
    """Fine-tuning has its own steps, four passes over 100 windows, and masks of one byte a weight."""
    without = plan_run(run(tmp_path, samples=100)).plan
    plan = plan_run(run(tmp_path, samples=100, repair=repair, repair_steps=steps)).plan
    assert (without.steps, plan.steps) == (400, 400 + more)
    assert plan.peak - without.peak == plan.items.get("masks", 0) == plan.items["pretrained"] // 2 * (more > 0)


def test_plan_of_a_run_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_model", "load_tokenizer", "open_source"):
        monkeypatch.setattr(pipeline, name, lambda *args, **options: pytest.fail("something was loaded"))
    planned = plan_run(run(tmp_path, samples=100, settings={"batch_size": 2}))
    assert planned.plan.steps == 200  # four passes of 50
    assert (planned.memory, planned.fits, planned.change) == (None, None, ())
    assert planned.plan.items["weights"] == pytest.approx(4 * 2.4e6, rel=0.05)
    assert list(tmp_path.iterdir()) == []


def test_w0_costs_what_it_is_stored_in(tmp_path: Path) -> None:
    """The demo's file is bf16, and learned in fp32."""
    settings = {"lambda2": 0.5}
    planned = plan_run(run(tmp_path, settings=settings)).plan
    assert planned.items["pretrained"] == pytest.approx(2 * 1.6e6, rel=0.05)


def test_what_fits(tmp_path: Path) -> None:
    planned = plan_run(run(tmp_path, gpu_memory=80.0))
    assert (planned.memory, planned.fits, planned.change, planned.changed) == (80 * 10**9, True, (), None)
    assert planned.plan.settings.checkpointing is False


def test_what_fits_with_checkpointing_is_no_change_to_ask_for(tmp_path: Path) -> None:
    plain, saving = (
        plan_run(run(tmp_path, settings={"checkpointing": checkpointing, "batch_size": 8})).plan.peak for checkpointing in (False, True)
    )
    planned = plan_run(run(tmp_path, settings={"batch_size": 8}, gpu_memory=(plain + saving) / 2 / 1e9))
    assert planned.fits
    assert planned.plan.settings.checkpointing is True


def test_advice_where_it_does_not_fit(tmp_path: Path) -> None:
    """The fewest changes, those that cost no quality first; each on top of those before."""
    settings = {"recipe": "paper", "batch_size": 8, "checkpointing": False}
    small = plan_run(run(tmp_path, settings={**settings, "checkpointing": True}, dtype="bfloat16")).plan.peak
    planned = plan_run(run(tmp_path, settings=settings, gpu_memory=small / (1 - memory.RESERVE) / 1e9 + 1e-3))
    assert planned.fits is False
    assert planned.change == ("--checkpointing", "--dtype bfloat16")
    assert planned.changed is not None
    assert planned.changed.peak == small
    assert (planned.changed.settings.weight_bits, planned.changed.settings.checkpointing) == (24, True)


def test_all_of_the_advice_is_of_real_options(tmp_path: Path) -> None:
    """The least that can be reached, where gradients are the highest point; a little less and nothing helps."""
    settings = {"batch_size": 2, "lambda2": 1.0}
    fewest = {**settings, "batch_size": 1, "checkpointing": True, "moments": "int8", "weight_bits": 16, "clip_mode": "none"}
    least = plan_run(run(tmp_path, settings=fewest, dtype="bfloat16", seqlen=8)).plan.peak / (1 - memory.RESERVE) / 1e9
    planned = plan_run(run(tmp_path, settings=settings, seqlen=8, gpu_memory=least + 1e-6))
    assert planned.change == ("--dtype bfloat16", "--batch-size 1", "--moments int8", "--weight-bits 16", "--clip-mode none")
    hopeless = plan_run(run(tmp_path, settings=settings, seqlen=8, gpu_memory=least - 1e-3))
    assert (hopeless.fits, hopeless.change, hopeless.changed) == (False, (), None)


def test_a_model_without_checkpointing_gets_other_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "supports_checkpointing", lambda model: False)
    peak = plan_run(run(tmp_path, dtype="bfloat16")).plan.peak
    planned = plan_run(run(tmp_path, gpu_memory=peak / (1 - memory.RESERVE) / 1e9 + 1e-3))
    assert planned.change == ("--dtype bfloat16",)


def test_other_methods(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plan: expected --method proxsparse, got wanda"):
        plan_run(run(tmp_path, method="wanda"))


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seqlen of at most 512"):
        plan_run(run(tmp_path, seqlen=513))
    with pytest.raises(ConfigError, match="--weight-bits 16 with bf16 weights only"):
        plan_run(run(tmp_path, settings={"weight_bits": 16}))
    for size in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--gpu-memory above 0, got"):
            run(tmp_path, gpu_memory=size)
    folder = tmp_path / "model"
    shutil.copytree(ASSET, folder)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entries, "model_type": "nothing"}))
    with pytest.raises(ModelError, match="a model type that transformers knows, got 'nothing'"):
        plan_run(run(tmp_path, model=str(folder)))


def test_hub_models_are_planned_from_their_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(spec: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        folder = tmp_path / "0123abc"
        folder.mkdir()
        shutil.copy(ASSET / "config.json", folder)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    planned = plan_run(run(tmp_path, model="some/model", settings={"lambda2": 1.0}))
    assert asked == [["*.json", "*.py"]]
    assert planned.plan.items["pretrained"] == plan_run(run(tmp_path, settings={"lambda2": 1.0})).plan.items["pretrained"]


def test_hub_models_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no/such-model: expected a model folder or a Hub id that can be fetched, got .*Check the spelling"
    ):
        plan_run(run(tmp_path, model="no/such-model"))


def test_the_package_plans_without_a_gpu(tmp_path: Path) -> None:
    """A GPU that is asked for and not there only takes its size with it."""
    if not torch.cuda.is_available():
        assert plan_run(run(tmp_path, device="cuda")).memory is None
    assert plan_run(run(tmp_path, device="cuda", gpu_memory=24.0)).memory == 24 * 10**9
    assert planning.RunPlan(MemoryPlan({"weights": 96}, None, 1, ProxSparse()), 100).fits is False


def test_repair_is_planned_with_the_settings_of_the_run(tmp_path: Path) -> None:
    """What makes learning fit makes fine-tuning fit, and its least squares holds the hidden states of all windows."""
    settings: dict[str, object] = {"moments": "int8", "clip_mode": "none", "batch_size": 4}
    without = plan_run(run(tmp_path, settings=settings)).plan
    tuned = plan_run(run(tmp_path, settings=settings, repair="finetune")).plan
    assert tuned.steps == 2 * without.steps == 400
    assert tuned.items["moments"] == without.items["moments"]
    assert tuned.peak <= without.peak + tuned.items["masks"]
    many = plan_run(run(tmp_path, samples=40_000, settings=settings, repair="least-squares")).plan
    assert many.items["hidden states"] == 40_000 * 512 * 4 * 192
    assert many.peak > without.peak
    narrow = plan_run(run(tmp_path, samples=40_000, settings=settings, repair="least-squares", gpu_memory=without.peak / 0.9e9)).plan
    assert narrow.items.get("hidden states", 0) <= 2 * 512 * 4 * 192  # the others wait in host memory
    assert narrow.peak < many.peak


@pytest.mark.parametrize(
    ("learning", "stored", "kept"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_w0_is_planned_as_it_is_kept(learning: torch.dtype, stored: torch.dtype, kept: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator).to(stored).to(learning)
    assert compact(weight).dtype == kept_dtype(learning, stored) == kept
