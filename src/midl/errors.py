"""The exceptions that midl raises on purpose: each names the argument, what came and what was expected."""

__all__ = ["CheckpointError", "DTypeError", "DataError", "KernelError", "MIDLError"]


class MIDLError(ValueError):
    """A wrong value or an impossible request; the base class of every error that midl raises on purpose."""


class DTypeError(MIDLError, TypeError):
    """A tensor whose dtype the layer cannot compute with."""


class KernelError(MIDLError, RuntimeError):
    """A kernel implementation was asked for that is not available for this call."""


class CheckpointError(MIDLError):
    """A file that is not a midl checkpoint, is damaged, or does not fit the model."""


class DataError(MIDLError):
    """A data set that is unknown, absent or damaged."""
