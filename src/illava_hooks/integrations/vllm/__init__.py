"""The encoder stage inside vLLM: a plugin that vLLM finds by itself.

``pip install illava-hooks`` beside vLLM, then ``vllm serve MODEL --hf-overrides '{"illava": {"keep_encoder": 0.5}}'``,
or ``LLM(MODEL, hf_overrides=overrides(keep_encoder=0.5))``. Without those settings vLLM is stock. docs/distributed.md
says what is exact, what is refused, and why the language model's stage is not there.
"""

from __future__ import annotations

import logging
from typing import Any

from illava_hooks.integrations.vllm.models import BACKEND, BACKEND_SINCE, MODELS
from illava_hooks.integrations.vllm.settings import overrides

__all__ = ["SUPPORTED", "overrides", "register", "version_of"]

logger = logging.getLogger("illava_hooks")

#: Versions of vLLM whose seams are known: from the first on, below the second.
SUPPORTED = ((0, 29), (0, 33))


def register() -> None:
    """What vLLM calls in each of its processes; may be called again.

    Classes are named by strings, so nothing is loaded for models that are not served. On a version whose seams are
    not known it says so once and changes nothing.
    """
    import vllm

    number = version_of(version := str(vllm.__version__))
    if number is None or not SUPPORTED[0] <= number < SUPPORTED[1]:
        first, last = (".".join(map(str, end)) for end in SUPPORTED)
        logger.warning(
            "vLLM is %s, and illava_hooks knows %s up to, not including, %s: vLLM is left as it is, nothing merges",
            version,
            first,
            last,
        )
        return
    from vllm import ModelRegistry
    from vllm.config import VllmConfig

    for architecture, model in (MODELS | (BACKEND if number >= BACKEND_SINCE else {})).items():
        ModelRegistry.register_model(architecture, model)
    _check_settings(VllmConfig, backend=number >= BACKEND_SINCE)


def version_of(version: str) -> tuple[int, int] | None:
    """The first two numbers of a version of vLLM, such as ``"0.32.0+cpu"``; None: there are none."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return None
    return major, minor


def _check_settings(kind: Any, backend: bool) -> None:
    """Makes vLLM read the settings where it checks its own: for every architecture, before a worker starts."""
    stock = kind.try_verify_and_update_config
    if getattr(stock, "illava", False):
        return

    def try_verify_and_update_config(self: Any) -> None:
        model = self.model_config
        # Once, as stock: a part of the model may come by here again with a copy that was checked.
        checked = model is None or getattr(model, "config_updated", False)
        if not checked and getattr(model.hf_config, "illava", None) is not None:
            from illava_hooks.integrations.vllm.checks import settle

            settle(self, backend)
        stock(self)

    try_verify_and_update_config.illava = True  # type: ignore[attr-defined]
    kind.try_verify_and_update_config = try_verify_and_update_config
