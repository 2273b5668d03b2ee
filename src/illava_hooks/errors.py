"""Errors of the library; every message names the argument, the value, the allowed range and the cure."""

__all__ = ["IllavaHooksError", "InputError", "MergeConfigError", "PatchStateError", "UnsupportedModelError"]


class IllavaHooksError(Exception):
    """Base class of every error that the library raises on purpose."""


class UnsupportedModelError(IllavaHooksError):
    """The model, its version or its configuration is outside of what can be patched."""


class PatchStateError(IllavaHooksError):
    """The call needs a patched model, or meets one in a state in which it cannot work."""


class MergeConfigError(IllavaHooksError, ValueError):
    """A setting of a merge is outside of its range."""


class InputError(IllavaHooksError, ValueError):
    """A file, a model or an argument of the tools and the command line that cannot be read."""
