"""Every error this package raises on purpose.

A message reads `{function}: expected {rule}, got {actual}. {what to do next}`; the command line prints it as one line
and exits with 1. Value errors are also `ValueError`, so that callers who know nothing of this package can catch them.
"""

from __future__ import annotations


class ProxSparseError(Exception):
    """Base of all errors below: a problem that is explained, not a bug."""


class ShapeError(ProxSparseError, ValueError):
    """A tensor has a shape the operation cannot take."""


class ConfigError(ProxSparseError, ValueError):
    """A setting has a value that makes no sense."""


class BackendError(ProxSparseError, RuntimeError):
    """Triton, a GPU or a library is missing; the message names what to install or choose."""


class DataError(ProxSparseError, ValueError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class ShortTextError(DataError):
    """The text can be read but is too short for the windows asked, or has nothing on the side of the split that is wanted."""


class ModelError(ProxSparseError, ValueError):
    """A model folder, Hub id or checkpoint cannot be used."""


class OutputError(ProxSparseError, OSError):
    """The output folder cannot be written, or holds something that must not be lost."""


class LearningError(ProxSparseError, ArithmeticError):
    """Learning diverged: a loss or a gradient is not finite."""


class ResourceError(ProxSparseError, RuntimeError):
    """Memory ran out; the message names the setting that lowers it."""
