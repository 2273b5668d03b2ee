"""What the page needs beside the package; imported before all that takes long to load."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from illava_hooks.errors import InputError

__all__ = ["check_gradio", "gradio"]

CURE = "pip install '.[demo]' in a checkout, or pip install 'illava-hooks[demo]'"


def check_gradio() -> None:
    """Looks for gradio without importing it, which makes a folder for its files.

    Raises:
        InputError: it is not installed, or another major version is.
    """
    try:
        found = version("gradio")
    except PackageNotFoundError:
        raise InputError(f"the demo page needs gradio, which is not installed; {CURE}") from None
    if not found.startswith("6."):
        raise InputError(f"the demo page needs gradio 6, and {found} is installed; {CURE}")


def gradio() -> Any:
    """The module.

    Raises:
        InputError: it cannot be imported.
    """
    check_gradio()
    try:
        return import_module("gradio")
    except ImportError as error:
        raise InputError(f"gradio cannot be imported ({error}); {CURE}") from error
