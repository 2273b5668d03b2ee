"""What families share whose decoder may be a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from illava_hooks.config import MergeConfig
from illava_hooks.engine.decoder import DecoderRun
from illava_hooks.errors import PatchStateError, UnsupportedModelError

__all__ = ["refuse_balancing", "refuse_balancing_by_default"]

_WHY = "routers see merged tokens or padding that moved, and stock's balancing loss needs all at their places"


def refuse_balancing_by_default(text: Any, config: MergeConfig) -> None:
    """Refuses a balancing loss over experts: it is computed from what each token of the prompt was routed by.

    Args:
        text: the configuration of the decoder.
        config: the settings.

    Raises:
        UnsupportedModelError: every call would ask for it.
    """
    if getattr(text, "output_router_logits", False) and (config.vit_layers or config.llm_layers):
        raise UnsupportedModelError(
            f"text_config.output_router_logits is True; {_WHY}; set output_router_logits=False"
        )


def refuse_balancing(kwargs: Mapping[str, Any], run: DecoderRun) -> None:
    """The same in one call of the text model, unless its routers see every token at its place.

    Args:
        kwargs: of the call.
        run: the call's prefill, before its first layer.

    Raises:
        PatchStateError: the call asks for what its routers saw, and tokens merge or padding moves.
    """
    rows, width = run.states[0].kept_at.shape
    if kwargs.get("output_router_logits") and run.counts[-1].lengths != (width,) * rows:
        raise PatchStateError(
            f"output_router_logits is True; {_WHY}; use output_router_logits=False, or merging(model, False)"
        )
