"""`pst bench decode`: a whole model that answers prompts, dense with zeros and then packed, by the same code in one run."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError, ConfigError, ModelError, ResourceError
from ..evaluation.memory import is_out_of_memory, peak_memory, reset_peak_memory
from ..export import load_packed
from ..formats.packed import is_packed_folder
from ..inference.choice import measured_table, warm_up
from ..inference.convert import sparsify_model, weight_bytes
from ..inference.library import find_library
from ..inference.linear import SparseLinear
from ..models.loading import load_model, resolve_model
from ..models.selection import plan_layers
from ..ops import mask_24
from ..progress import SILENT, Progress
from ..sparsity import KEPT, kept_per_block
from .decoder import Decoder, compiled_step
from .shapes import MODELS, TINY, build, config_of
from .table import Row
from .timer import Machine, Rival, Roof, Timing, measure
from .ways import reason

DENSE, SPARSE = "dense", "sparse"
BATCHES, PROMPT, NEW_TOKENS = (1, 8, 32), 128, 64
TINY_BATCHES, TINY_PROMPT, TINY_NEW_TOKENS = (1, 2), 16, 8
DTYPE = torch.bfloat16
ROUNDS = 5
COMPARED = 32  # greedy tokens
# |sparse - dense| / |dense| of the logits. Both are in bf16, and their roundings differ: L blocks with some eight roundings of 2^-9 each,
# 2^-9 sqrt(8 L) in all, 0.04 for 48 of them. One wrong layer of so many moves them by 0.1 and more.
LOGITS_TOLERANCE = 0.08
PREFILL, PREFILL_GRAPH, STEPS = "prefill", "prefill, graph", "steps"


@dataclass(frozen=True)
class DecodeBench:
    """models: names in MODELS, with random weights pruned by magnitude, or folders: 2:4 models, dense or packed.

    prompt, new_tokens: tokens of each sequence. compile: the step for one token; None: on a GPU. None elsewhere: by the device.
    """

    models: tuple[str, ...] | None = None
    batch: tuple[int, ...] | None = None
    prompt: int | None = None
    new_tokens: int | None = None
    compile: bool | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        counts = [("--batch", count) for count in self.batch or ()]
        for option, count in (*counts, ("--prompt", self.prompt), ("--new-tokens", self.new_tokens)):
            if count is not None and count < 1:
                raise ConfigError(f"bench decode: expected {option} of at least 1, got {count}. Choose another value.")
        for name in self.models or ():
            if name not in MODELS and not Path(name).is_dir():
                raise ConfigError(f"bench decode: expected --model of {', '.join(MODELS)}, or a folder, got {name!r}. Choose one of these.")

    def run(self, place: Machine, progress: Progress = SILENT) -> Iterator[Row]:
        """One row per model, variant and batch. What fails, or is wrong, has a row with the reason.

        Raises: ResourceError: not even the model fits. ModelError: a folder that is not a 2:4 model.
        """
        place = dataclasses.replace(place, rounds=self.rounds or min(place.rounds, ROUNDS))
        if place.device.type == "cuda":
            progress.note(f"Library: {find_library(place.device).reason}")
            if not measured_table(place.device):
                progress.note("No measured choices, built-in thresholds: `pst bench linear --save` for this model measures them.")
        roof = Roof(place)
        default = TINY if place.device.type == "cpu" else next(iter(MODELS))
        for name in self.models or (default,):
            yield from self._model(name, place, roof, progress)

    def _model(self, name: str, place: Machine, roof: Roof, progress: Progress) -> Iterator[Row]:
        small = place.device.type == "cpu"
        batches = self.batch or (TINY_BATCHES if small else BATCHES)
        _clear(place.device)  # what is freed later would count as less than nothing
        others = torch.cuda.memory_allocated() if place.device.type == "cuda" else 0
        model = pruned_model(name, place.device)
        layers = sum(weight.nbytes for weight in _pruned_weights(model).values())
        session = _Session(
            name,
            self.prompt or (TINY_PROMPT if small else PROMPT),
            self.new_tokens or (TINY_NEW_TOKENS if small else NEW_TOKENS),
            not small if self.compile is None else self.compile,
            place,
            roof,
            others,
        )
        with progress.task(f"decode {name}", total=2 * len(batches)) as bar:
            dense = {}
            for batch in batches:
                dense[batch] = session.measured(model, batch, None)
                yield session.row(DENSE, batch, dense[batch], None, _Weights(layers, layers, read_bytes(model), whole_bytes(model)))
                bar.advance(variant=DENSE, batch=batch)
            torch.compiler.reset()  # whose guards hold the dense weights
            model = sparsify_model(model)
            _clear(place.device)
            sizes = weight_bytes(model)
            for batch in batches:
                found = session.measured(model, batch, dense[batch])
                weights = _Weights(sizes.packed, sizes.dense, read_bytes(model), whole_bytes(model))
                yield session.row(SPARSE, batch, found, dense[batch], weights)
                bar.advance(variant=SPARSE, batch=batch)


def pruned_model(name: str, device: torch.device) -> nn.Module:
    """A 2:4 model in eval mode, its weights dense with zeros: random ones of a shape in MODELS, pruned by magnitude, or a folder's."""
    try:
        if name not in MODELS:
            model = _loaded(Path(name), device)
        else:
            model = build(config_of(name), device, DTYPE)
            with torch.no_grad():
                for weight in _pruned_weights(model).values():
                    weight.masked_fill_(~mask_24(weight.abs()), 0)  # +0.0, which a product with the mask would not give
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"bench decode: expected room for {name}, got out of memory. Choose a smaller --model.") from error
    return model.eval().requires_grad_(False)


def _loaded(folder: Path, device: torch.device) -> nn.Module:
    if not is_packed_folder(folder):
        dense: nn.Module = load_model(resolve_model(str(folder)), dtype=DTYPE, device=device)
        if all(int(kept_per_block(weight).max()) > KEPT for weight in _pruned_weights(dense).values()):
            raise ModelError(f"bench decode: expected a 2:4 model, got {folder}, none of whose layers is. Prune it with `pst prune`.")
        return dense
    model: nn.Module = load_packed(folder, device=device, dtype=DTYPE, fuse=False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=DTYPE)
            linear.weight, linear.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias  # type: ignore[assignment]
            model.set_submodule(name, linear)
    return model


def _pruned_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight for name in plan_layers(model).selected()}  # type: ignore[misc]


def whole_bytes(model: nn.Module) -> int:
    sizes = weight_bytes(model)
    return sizes.packed + sizes.others


def read_bytes(model: nn.Module) -> int:
    """Bytes of weights that one step reads: all of them, of an input embedding, which is a look-up, none unless it is the output head too.

    What a step reads and writes besides, keys and values above all, is left out.
    """
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is table
    return whole_bytes(model) - (0 if tied else int(table.nbytes))


@dataclass(frozen=True)
class _Weights:
    """Bytes: of the pruned layers, as they are and dense; read in a step; of the whole model."""

    layers: int
    dense_layers: int
    read: int
    whole: int


@dataclass(frozen=True)
class _Found:
    """What was measured of one variant and batch; `note` alone where that failed."""

    timings: Mapping[str, Timing] = dataclasses.field(default_factory=dict)
    logits: Tensor | None = None  # after the prompt, and after `first`
    first: Tensor | None = None
    greedy: Tensor | None = None  # [batch, n]
    logits_error: float | None = None
    compiled: str | None = None
    peak: int | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Session:
    """One model's measurements, and what they share."""

    name: str
    prompt: int
    new_tokens: int
    compile: bool
    place: Machine
    roof: Roof
    others: int  # bytes on the GPU that are not of the model

    def measured(self, model: nn.Module, batch: int, dense: _Found | None) -> _Found:
        """Checks against `dense`, then times. Never raises: a failure is a note."""
        try:
            return self._measured(model, batch, dense)
        except Exception as problem:  # kernels, compilers and libraries raise anything
            return _Found(note=reason(problem))
        finally:
            _clear(self.place.device)

    def _measured(self, model: nn.Module, batch: int, dense: _Found | None) -> _Found:
        on_gpu = self.place.device.type == "cuda"
        reset_peak_memory(self.place.device.type)
        decoder = Decoder(model, self._prompts(model, batch), self.new_tokens)
        logits, first = decoder.logits(None if dense is None else dense.first)
        error = None
        if dense is not None:
            if dense.logits is None:
                raise BackendError("no dense result to compare with")
            error = float((logits - dense.logits).norm() / dense.logits.norm())
            if not error <= LOGITS_TOLERANCE:
                return _Found(logits_error=error, note="wrong: these are not the dense model's logits")
        how, note = "no", None
        if self.compile:
            try:
                decoder.step, how = compiled_step(decoder)
            except Exception as problem:  # compilers raise anything
                note = f"not compiled: {reason(problem)}"
        timings, greedy = self._timed(decoder)
        return _Found(timings, logits, first, greedy, error, how, peak_memory("cuda") - self.others if on_gpu else None, note)

    def _prompts(self, model: nn.Module, batch: int) -> Tensor:
        """Random tokens, the same for both variants."""
        config: Any = model.config
        generator = torch.Generator().manual_seed(batch)
        vocabulary = config.get_text_config().vocab_size
        return torch.randint(vocabulary, (batch, self.prompt), generator=generator).to(self.place.device)

    def _timed(self, decoder: Decoder) -> tuple[dict[str, Timing], Tensor]:
        """Timings of the prompt's pass, of one of its steps, and the greedy tokens. On a GPU steps are replays of one CUDA graph."""
        clock = self.place.clock
        on_gpu = self.place.device.type == "cuda"
        if on_gpu:
            # What only the graphs will run is compiled, loaded and searched for before their capture, where none of that is allowed.
            with warm_up():
                decoder.prefill()
                decoder.rewind()
                decoder.advance()
        decoder.rewind()
        replay = clock.prepare(Rival("step", decoder.advance))
        # A user waits for the first token, so the GPU is idle before each pass.
        rivals = [Rival(PREFILL, decoder.prefill, capture=False, reset=clock.finish), self.roof.rival]
        if on_gpu:
            rivals.append(Rival(PREFILL_GRAPH, decoder.prefill))
        decoder.rewind()
        rivals.append(Rival(STEPS, lambda: [replay() for _ in range(self.new_tokens)], self.new_tokens, False, decoder.rewind))
        timings = measure(rivals, clock, self.place.rounds)
        decoder.prefill()
        decoder.rewind()
        tokens = [decoder.token.clone()]
        for _ in range(min(COMPARED, self.new_tokens) - 1):
            replay()
            tokens.append(decoder.token.clone())
        return timings, torch.cat(tokens, 1)

    def row(self, variant: str, batch: int, found: _Found, dense: _Found | None, weights: _Weights) -> Row:
        """dense: of the same batch, None for itself."""
        row: Row = {
            "bench": "decode",
            "variant": variant,
            "model": self.name,
            "batch": batch,
            "prompt": self.prompt,
            "new_tokens": self.new_tokens,
            "weight_gb": weights.whole / 1e9,
            "layers_gb": weights.layers / 1e9,
            "layers_ratio": weights.layers / weights.dense_layers,
            "logits_error": found.logits_error,
        }
        if found.timings:
            row |= self._figures(batch, found, dense or found, weights)
        return row | {"note": found.note}

    def _figures(self, batch: int, found: _Found, dense: _Found, weights: _Weights) -> Row:
        mine, before = found.timings, dense.timings
        graph = mine.get(PREFILL_GRAPH)
        seconds = mine[STEPS].median
        figures = self.roof.figures(mine, STEPS, weights.read)
        return {
            "ttft_ms": 1e3 * mine[PREFILL].median,
            "ttft_graph_ms": None if graph is None else 1e3 * graph.median,
            "ms_per_step": 1e3 * seconds,
            "ms_20": 1e3 * mine[STEPS].low,
            "ms_80": 1e3 * mine[STEPS].high,
            "tokens_per_s": batch / seconds,
            "speed_up": before[STEPS].us / mine[STEPS].us,
            "ttft_speed_up": before[PREFILL].us / mine[PREFILL].us,
            **{key: figures[key] for key in ("gb_per_s", "roof_gb_per_s", "of_roof", "samples")},
            "peak_bytes": found.peak,
            "compiled": found.compiled,
            "same_tokens": _same(found.greedy, dense.greedy),
        }


def _same(tokens: Tensor | None, others: Tensor | None) -> str | None:
    """How many greedy tokens agree. Random weights have near-ties, and after a token that differs all may: no failure."""
    if tokens is None or others is None:
        return None
    return f"{int((tokens == others).sum())} of {tokens.numel()}"


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
