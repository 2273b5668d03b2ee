"""What the tests of whole kinds of faults share: parts by family, warnings that were said, continued conversations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from families import family_of
from helpers import Found, assert_says, forward
from illava_hooks import PatchStateError, UnsupportedModelError, patch
from tiny_models import Inputs, Sample, inputs_for

#: What forwards and `generate` of this release call the cache.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
#: For padded rows: some stock forwards count positions over padding.
PADDED: dict[str, Any] = {"atol": 2e-4, "rtol": 0.0}


def tower(model: Any) -> nn.Module:
    """The vision tower of a model with its head."""
    return getattr(model.model, family_of(model).tower_name)


def vision_layers(model: Any) -> Any:
    """The layers of the vision encoder."""
    return family_of(model).encoder_layers(model)


def decoder_layers(model: Any) -> Any:
    """The layers of the language model."""
    return family_of(model).language(model).layers


def said(caplog: pytest.LogCaptureFixture, *parts: str) -> list[str]:
    """Warnings of the library that hold each part, without regard to case."""
    found = [r.getMessage() for r in caplog.records if r.name.startswith("illava_hooks") and r.levelno >= 30]
    return [message for message in found if all(part.lower() in message.lower() for part in parts)]


def outputs(model: Any, inputs: Inputs, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the last hidden states of all positions, whichever logits are kept."""
    found = forward(model, inputs, **kwargs)
    return found["forward.logits"], last_hidden(found)


def last_hidden(found: Found) -> Tensor:
    """The hidden states behind the last layer."""
    return found[max(name for name in found if name.startswith("forward.hidden_states."))]


def works_or_refuses(call: Callable[[], Any], *parts: str) -> Any:
    """What the call gives; None where it is refused in one line that holds each part."""
    try:
        return call()
    except (UnsupportedModelError, PatchStateError) as error:
        assert_says(error, *parts)
        return None


# ---------------------------------------------------------------------------- conversations by `forward`


def prompt_positions(model: Any, inputs: Inputs) -> Tensor:
    """Positions of each row as if it were alone: ``(B, N)``, or ``(3, B, N)``; padding has any."""
    return family_of(model).positions(model, inputs)


def prefill(model: Any, inputs: Inputs, cache: Any = None) -> tuple[Any, Tensor]:
    """A cache that holds a prompt, and the next position of each row: ``(B,)``."""
    where = prompt_positions(model, inputs)
    given = {} if cache is None else {CACHE: cache}
    with torch.no_grad():
        out = model(**inputs, position_ids=where, **given)
    return out.past_key_values, where.amax(-1).reshape(-1, len(inputs["input_ids"])).amax(0) + 1


def feed(model: Any, cache: Any, ids: Tensor, start: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of more text behind a cache, from position ``start`` of each row on."""
    where = family_of(model).spread(start[:, None] + torch.arange(ids.shape[1]))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=where, **{CACHE: cache}).logits


def assert_balancing_loss_is_stocks(model: Any, sample: Sample, settings: Mapping[str, Any]) -> None:
    """Of a mixture of experts, where nothing is removed: its routers see what they see in stock.

    Args:
        model: as it comes; it is patched.
        sample: with an image.
        settings: that merge.
    """
    inputs = inputs_for(model, [sample])
    asked = {**inputs, "output_router_logits": True, "labels": inputs["input_ids"]}
    stock = model(**asked)
    session = patch(model, **{**settings, "vit_r": 1e-4, "llm_ratio": 0.9999})
    assert torch.equal(stock.aux_loss, model(**asked).aux_loss)
    assert session.report.kept_fraction == 1
    # Rows are laid out anew, and the loss would leave out others than padding.
    with pytest.raises(PatchStateError, match="^output_router_logits is True"):
        model(**inputs_for(model, [sample, Sample(5, text=(4,))], "right"), output_router_logits=True)
