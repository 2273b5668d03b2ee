"""Errors of the library; every message names the argument, the value, the allowed range and the cure."""

__all__ = ["IllavaHooksError", "InputError", "MergeConfigError", "NotYet", "PatchStateError", "UnsupportedModelError"]


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


class _NotYetError(PatchStateError, AttributeError):
    """An attribute error as well, so that ``hasattr`` and whatever lists an object's attributes go on."""


class NotYet:
    """What an attribute holds before a forward has filled it: false, and an error for whoever asks it for something.

    Debuggers and notebooks look at every attribute of an object: an attribute that raises breaks them, and None would
    say nothing of what to do.
    """

    __slots__ = ("_reason",)

    def __init__(self, reason: str) -> None:
        """Says ``reason`` to whoever looks or asks."""
        self._reason = reason

    def __getattr__(self, name: str) -> object:
        """Raises.

        Raises:
            PatchStateError: always, but for names that Python itself looks for.
        """
        if name[:2] == "__":
            raise AttributeError(name)
        raise _NotYetError(self._reason)

    def __bool__(self) -> bool:
        """False, as None is."""
        return False

    def __repr__(self) -> str:
        """The reason."""
        return f"<{self._reason}>"
