"""The sparse matrix libraries that PyTorch brings: which one a device has, what it takes, and how it is called."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.pack import pack_24
from ..reference.metadata import reorder

CUSPARSELT, CUTLASS = "cusparselt", "cutlass"
SLOW_CUSPARSELT = 800  # 0.8.0 lost speed on Hopper, says NVIDIA; 0.8.1 has it back
HALVES = (torch.float16, torch.bfloat16)
TOKENS = 8  # both libraries take batches in multiples of this
ALIGNMENT = 16  # bytes

Algorithm = tuple[int, int, int]  # alg_id, split_k, split_k_mode: what cuSPARSELt's search finds


@dataclass(frozen=True)
class Library:
    """name: "cusparselt", "cutlass" or None. reason: why, in one line. order: of the metadata that it reads."""

    name: str | None
    reason: str
    order: str = "linear"


@dataclass(frozen=True)
class _Rule:
    """Shapes that a library takes: its own rule, and the tiles of the metadata's order."""

    title: str
    rows: int
    columns: int


_RULES = {CUSPARSELT: _Rule("cuSPARSELt", 64, 32), CUTLASS: _Rule("CUTLASS", 32, 64)}


def judge(capability: tuple[int, int] | None, *, hip: bool = False, cusparselt: int | None = None) -> Library:
    """The library of a device.

    Args:
        capability: compute capability; None: not a CUDA device.
        hip: an AMD card.
        cusparselt: version that torch was built with, 800 for 0.8.0; None: without.
    """
    if capability is None or hip:
        return Library(None, "none: an AMD GPU" if hip else "none: not a CUDA GPU")
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return Library(None, f"none: {name} has no 2:4 tensor cores, 8.0 is the first that has")
    if capability < (9, 0):
        return Library(CUTLASS, f"CUTLASS: {name}", "ampere")
    if cusparselt is None:
        return Library(None, f"none: {name} needs cuSPARSELt, and this torch has none")
    version = f"{cusparselt // 1000}.{cusparselt // 100 % 10}.{cusparselt % 100}"
    slow = "; slow on Hopper, fixed in 0.8.1 (torch 2.12)" if cusparselt == SLOW_CUSPARSELT else ""
    return Library(CUSPARSELT, f"cuSPARSELt {version}: {name}{slow}", "hopper")


@functools.cache
def find_library(device: torch.device) -> Library:
    """`judge` for a device of this machine, once a device. Waits for the device the first time."""
    if device.type != "cuda":
        return judge(None)
    cusparselt = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    library = judge(torch.cuda.get_device_capability(device), hip=torch.version.hip is not None, cusparselt=cusparselt)
    if library.name == CUSPARSELT and not _reads_our_order(device):
        return Library(None, f"none: {library.reason}, which orders the metadata in another way than on Hopper")
    return library


def _reads_our_order(device: torch.device) -> bool:
    """Whether cuSPARSELt compresses to the blob that we write: its order is not documented, and may change with card or version."""
    rows, columns = 128, 128
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.rand(rows, columns // 4, 4, generator=generator, device=device)
    kept = scores.argsort(-1).argsort(-1) >= 2
    w = (scores * kept).reshape(rows, columns).half()
    values, metadata = pack_24(w, kept.reshape(rows, columns))
    ours = torch.cat([values.flatten(), reorder(metadata, "hopper").view(values.dtype)])
    try:
        theirs = torch._cslt_compress(w).flatten()
    except RuntimeError:  # the library refuses the card
        return False
    return theirs.numel() >= ours.numel() and torch.equal(theirs[: ours.numel()].view(torch.int16), ours.view(torch.int16))


def takes(library: Library, dtype: torch.dtype, out_features: int, in_features: int) -> bool:
    """Whether the library multiplies with weights of that dtype and shape."""
    if library.name is None or dtype not in HALVES:
        return False
    rule = _RULES[library.name]
    return out_features > 0 and in_features > 0 and out_features % rule.rows == 0 and in_features % rule.columns == 0


def order_for(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> str:
    """The order in which a layer keeps its metadata on `device`: its library's, or linear where that does not take the layer."""
    library = find_library(device)
    if takes(library, dtype, out_features, in_features):
        return library.order
    if library.name is not None:
        _say_refusal(library.name, dtype, out_features, in_features)
    return "linear"


@functools.cache
def _say_refusal(name: str, dtype: torch.dtype, out_features: int, in_features: int) -> None:
    """One warning for each shape."""
    rule = _RULES[name]
    warnings.warn(
        f"SparseLinear: {rule.title} takes fp16 and bf16 weights of {rule.rows} x {rule.columns} tiles, got {dtype} "
        f"{out_features} x {in_features}: what our kernel does not do either multiplies with the unpacked weight.",
        stacklevel=2,
    )


def multiply(name: str, blob: Tensor, values: Tensor, metadata: Tensor, x: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
    """x [tokens, in] times a packed weight that the library takes: [tokens, out]. No sync; can be captured.

    Args:
        blob: values, then metadata, in one tensor of the weight's dtype. values [out, in / 2] and metadata (flat): its views.
        algorithm: for cuSPARSELt; CUTLASS has no choice.
    """
    padded = _padded(x)
    if name == CUSPARSELT:
        y = _cusparselt(blob.view(values.shape[0], -1), padded.t(), bias, algorithm)  # some versions of torch insist on rows
    else:
        words = metadata.view(values.shape[0], -1)
        columns = padded.t()
        if bias is None:
            y = torch._sparse_semi_structured_mm(values, words, columns).t()
        else:
            y = torch._sparse_semi_structured_addmm(bias, values, words, columns).t()
    return y[: x.shape[0]].contiguous()


def _padded(x: Tensor) -> Tensor:
    if x.shape[0] % TOKENS:  # a pad by nothing copies too
        x = F.pad(x, (0, 0, 0, -x.shape[0] % TOKENS))
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


# (device, dtype, shape, power of two of tokens) -> what was found; None: nothing works.
_FOUND: dict[tuple[torch.device, torch.dtype, int, int, int], Algorithm | None] = {}


def found_algorithm(blob: Tensor, x: Tensor, out_features: int, *, captured: bool) -> Algorithm | None:
    """cuSPARSELt's fastest algorithm for x [tokens, in], searched once for each weight shape and power of two of tokens.

    None: none found yet, and none can be searched in a CUDA graph's capture, as the search times all of them; or none works.
    """
    key = (x.device, x.dtype, out_features, x.shape[1], max(1, x.shape[0] - 1).bit_length())
    if key not in _FOUND:
        if captured:
            return None
        _FOUND[key] = search_algorithm(blob, x)
    return _FOUND[key]


SEARCHES, REPLAYS = 3, 5
_SEARCHING = threading.Lock()
_CANDIDATES: dict[tuple[torch.device, torch.Size], set[Algorithm]] = {}


def search_algorithm(blob: Tensor, x: Tensor) -> Algorithm | None:
    """The fastest algorithm of cuSPARSELt for the packed weight `blob` and x [tokens, in]; None where it refuses all of them.

    Its search looks once at each and is often wrong: what several searches find, and found for other counts, runs off in CUDA graphs.
    In bf16 for fp16 too, whose own search takes an illegal instruction, and the process with it (0.8.0, H200). What it finds serves both.
    Waits for the device, many times: not while another thread captures a graph.
    """
    rows = blob.view(torch.bfloat16).view(-1, x.shape[1] // 16 * 9)  # values and metadata take 9/16 of a row
    columns = _padded(x).view(torch.bfloat16).t()
    with _SEARCHING, torch.cuda.device(x.device):  # the search has no guard of its own
        candidates = _CANDIDATES.setdefault((x.device, rows.shape), set())
        with suppress(RuntimeError):
            for _ in range(SEARCHES):
                candidates.add(torch._C._cusparselt.mm_search(rows, columns, None, None, None, True)[:3])  # type: ignore[attr-defined]
        times = {}
        for algorithm in sorted(candidates):
            with suppress(RuntimeError):  # found for another count, and not for this one
                times[algorithm] = _seconds(partial(_cusparselt, rows, columns, None, algorithm))
    return min(times, key=times.__getitem__, default=None)


def _cusparselt(rows: Tensor, columns: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
    alg_id, split_k, split_k_mode = algorithm
    y: Tensor = torch._cslt_sparse_mm(
        rows, columns, bias=bias, transpose_result=True, alg_id=alg_id, split_k=split_k, split_k_mode=split_k_mode
    )
    return y


def _seconds(work: Callable[[], object]) -> float:
    """The shortest replay of `work` in a CUDA graph: in eager code the host takes longer than the device."""
    graph = torch.cuda.CUDAGraph()
    work()
    torch.cuda.current_stream().synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3)
    return min(times)
