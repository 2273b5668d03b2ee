"""What transformers calls the cache: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers.masking_utils import create_causal_mask

__all__ = ["CACHE", "cache_of"]

#: The argument of every forward and mask function that takes a cache.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache of a call, or None; the deprecated name reaches hooks before transformers translates it."""
    found = kwargs.get(CACHE)
    return kwargs.get("past_key_values") if found is None else found
