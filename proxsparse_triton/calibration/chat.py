"""Messages as the text that a model was trained on: the tokenizer's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BackendError, ConfigError
from .rows import Chat, Messages, RowRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_of(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """A function from messages to text by the chat template of `tokenizer`.

    It raises ConfigError where the tokenizer has none, and RowRefusedError where the template refuses these messages.
    """

    def text(messages: Messages) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "chat_of: expected a tokenizer with a chat template for rows of messages, got one without. "
                "Use the tokenizer of the model's instruct version, or rows with plain text."
            )
        try:
            return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
        except ImportError as error:
            raise BackendError(f"chat_of: expected the library jinja2, got {error}. Run: pip install jinja2") from error
        except MemoryError:
            raise
        except Exception as error:  # a template is a program of the model's makers: it may raise anything about a row
            raise RowRefusedError(" ".join(str(error).split()).rstrip(".") or type(error).__name__) from error

    return text
