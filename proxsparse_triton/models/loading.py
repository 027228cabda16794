"""A checked model folder becomes a model and a tokenizer, or one line that says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BackendError, ConfigError, ModelError, ProxSparseError, ResourceError
from ..progress import SILENT, Progress
from .checkpoint import FLOAT_DTYPES, listed, one_line, read_json_object, stored_dtype
from .declared import check_counts, skeleton
from .quiet import quiet
from .source import CONFIG, ModelSource, file_hashes, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelSource",
    "checked_device",
    "checked_dtype",
    "file_hashes",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_whole",
    "max_seqlen",
    "resolve_model",
    "vocabulary_size",
]

CONTEXT_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
UNLIMITED = 10**8  # tokenizers and configs write "no limit" as 1e30 and the like
TOKENIZER_JSON = "tokenizer.json"
# Buffers that older versions of transformers saved and today's compute: not weights, so neither missing nor unexpected.
KNOWN_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "position_ids")

# Code, prose, digits, scripts and runs of white space: where tokenizers split text by different rules, they differ here.
SAMPLE_TEXT = (
    "def f(x: int = 10_000) -> float:\n    return x * 3.14159  # it's HERE'S\n\n\n\tif x >= 2026:\n\t\traise ValueError(f'{x!r}')\r\n"
    "  The  year 1984, don't   we'll I'M;  naïve Übergröße 中文分词 русский עברית 🙂🚀 e\u0301 \u00a0 ---- ==== ...\n \n  12345678 x²\n"
)


def load_model(
    source: ModelSource, *, dtype: torch.dtype | None, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of `source`, whole: in eval mode, without the key-value cache.

    Args:
        dtype: type of the weights in memory; None: as they are stored (for pickles as config.json says).
        trust_remote_code: run Python files that lie beside the weights.
    Raises: ModelError: not a causal language model, tensors missing, unexpected or of another shape (transformers would fill
        them at random and go on), code that is not trusted. ConfigError: a dtype to store, not to compute in, no such device.
        BackendError: a GPU that is not there. ResourceError: out of memory.
    """
    from transformers import AutoModelForCausalLM

    place = checked_device(device)
    dtype = checked_dtype(source, dtype)
    config = load_config(source, trust_remote_code=trust_remote_code)
    skeleton(source, config, dtype=dtype, trust_remote_code=trust_remote_code)  # which looks at the sizes

    def load() -> tuple[PreTrainedModel, Mapping[str, Any]]:
        loaded: tuple[PreTrainedModel, Mapping[str, Any]] = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype if dtype is not None else "auto",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; _check_keys refuses them
        )
        return loaded

    model = load_whole(source, place, load)
    model.config.use_cache = False
    model.config.get_text_config().use_cache = False
    return model


def load_whole(source: ModelSource, place: torch.device, load: Callable[[], tuple[PreTrainedModel, Mapping[str, Any]]]) -> PreTrainedModel:
    """What `load` returns, a model and transformers' loading info, on `place` and in eval mode; every failure in one line.

    Raises: ModelError: `load` failed, or tensors are missing, unexpected or of another shape. ResourceError: out of memory.
    """
    try:
        with quiet():
            model, info = load()
        _check_keys(source, model, info)
        model = model.to(place)
    except ProxSparseError:
        raise
    except Exception as error:  # a library that reads what users bring raises anything; --debug shows what
        if _out_of_memory(error):
            raise ResourceError(
                f"{source.spec}: expected room for the model on {place}, got out of memory. "
                "Use --dtype bfloat16, --device cpu or a smaller model."
            ) from error
        raise ModelError(
            f"{source.spec}: expected a model that transformers can load, got {one_line(error)}. Check config.json and the weights."
        ) from error
    return model.eval()


def checked_dtype(source: ModelSource, dtype: torch.dtype | None) -> torch.dtype | None:
    """`dtype`, or as the weights are stored; None where only config.json can know. ConfigError: not a dtype to compute in."""
    if dtype is None:
        return stored_dtype(source.weight_files) if source.is_safetensors else None
    if dtype not in FLOAT_DTYPES.values():
        raise ConfigError(f"load_model: expected a dtype to compute in, got {dtype}. Use float32, bfloat16 or float16.")
    return dtype


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False, progress: Progress = SILENT) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with a note to `progress` if it does not split text as the folder's tokenizer.json does.

    transformers may replace a folder's tokenizer by the class of the model type; text then turns into other ids than the model
    was trained on, and perplexity rises without a word.

    Raises: ModelError: no tokenizer files (transformers returns an empty tokenizer for some), broken ones, ids beyond the vocabulary.
    """
    from transformers import AutoTokenizer

    advice = "Copy tokenizer.json and tokenizer_config.json of the model into its folder."
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(_untrusted(source, "a tokenizer")) from error
        raise ModelError(f"{source.spec}: expected a tokenizer, got {one_line(error)}. {advice}") from error
    try:
        with quiet():
            ids = list(tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"])
    except Exception as error:
        raise ModelError(f"{source.spec}: expected a tokenizer for any text, got {one_line(error)}. {advice}") from error
    if set(ids) <= set(tokenizer.all_special_ids):
        raise ModelError(
            f"{source.spec}: expected a tokenizer, got an empty {type(tokenizer).__name__}, as there are no tokenizer files. {advice}"
        )
    _check_vocabulary(source, max(ids))
    own = _own_ids(source)
    if own is not None and own != ids:
        at = next((i for i, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), min(len(ids), len(own)))
        progress.note(
            f"{source.spec}: transformers loads a {type(tokenizer).__name__} that splits text differently from the folder's "
            f"{TOKENIZER_JSON} ({len(ids)} against {len(own)} tokens of a sample, from token {at} on): "
            "perplexity may be higher than the model deserves."
        )
    return tokenizer


def max_seqlen(config: Any) -> int | None:
    """The longest window, in tokens, that a model with this configuration takes; None if it has no limit or none is known."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "alibi", False):  # Falcon-RW: the field is there, the positions are relative
        return None
    for name in CONTEXT_LIMITS:
        value = getattr(text, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < UNLIMITED:
            return int(value)
    return None


def vocabulary_size(config: Any) -> int | None:
    """How many rows the embedding of a model with this configuration has; None if none is known."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text, "vocab_size", None)
    return value if isinstance(value, int) and value > 0 else None


def checked_device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"load_model: expected a device such as cpu or cuda, got {device!r}. Check --device.") from error
    gpus = torch.cuda.device_count() if place.type == "cuda" else 0
    if place.type == "cuda" and (place.index or 0) >= gpus:
        raise BackendError(f"load_model: expected a CUDA GPU for {place}, got {gpus} GPUs. Use --device cpu, or install torch with CUDA.")
    return place


def _untrusted(source: ModelSource, what: str) -> str:
    advice = "Read that code, then allow it with --trust-remote-code."
    return f"{source.spec}: expected {what} that transformers knows, got one with Python code of its own. {advice}"


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The configuration object of a causal language model; every other kind is refused."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    raw = read_json_object(source.folder / CONFIG)
    check_counts(source, raw)
    model_type, auto_map = raw.get("model_type"), raw.get("auto_map") or {}
    recognised = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not recognised and not (auto_map and trust_remote_code):
        if auto_map:
            raise ModelError(_untrusted(source, "a model"))
        raise ModelError(
            f"{source.spec}: expected a model type that transformers knows, got {model_type!r}. Check config.json, or upgrade transformers."
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{source.spec}: expected a valid {CONFIG}, got {one_line(error)}. Correct it.") from error
    own_code = "AutoModelForCausalLM" in auto_map
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if own_code and not known and not trust_remote_code:
        raise ModelError(_untrusted(source, "a model"))
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if getattr(config, "is_encoder_decoder", False) or encoder or not (known or own_code):
        kind = (
            "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "an encoder" if encoder else "another kind of model"
        )
        raise ModelError(f"{source.spec}: expected a causal language model, got {kind} ({model_type}). Choose a decoder-only model.")
    return config


def _check_keys(source: ModelSource, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise ModelError for tensors that the model has and the files do not, the other way round, or with another shape."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = []
    for kind, words in (("missing", "missing"), ("unexpected", "unexpected"), ("mismatched", "of another shape")):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"])
        keys = [key for key in keys if key in parameters or not key.endswith(KNOWN_BUFFERS)]
        if keys:
            found.append(f"{len(keys)} {words} ({listed(keys)})")
    if found:
        raise ModelError(
            f"{source.spec}: expected exactly the tensors of the model that config.json describes, got {' and '.join(found)}. "
            "The weights are incomplete or belong to another configuration."
        )


def _check_vocabulary(source: ModelSource, largest: int) -> None:
    raw = read_json_object(source.folder / CONFIG)
    size = raw.get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise ModelError(
            f"{source.spec}: expected token ids below the model's vocabulary of {size}, got {largest}. The tokenizer is another model's."
        )


def _own_ids(source: ModelSource) -> list[int] | None:
    """Ids of the sample text by tokenizer.json alone; None without one, or if it cannot encode the sample."""
    path = source.folder / TOKENIZER_JSON
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        own = Tokenizer.from_file(str(path))
        own.no_truncation()
        own.no_padding()
        return list(own.encode(SAMPLE_TEXT, add_special_tokens=False).ids)
    except Exception:  # tokenizers raises plain Exception; AutoTokenizer has read the file, so there is only nothing to compare with
        return None


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
