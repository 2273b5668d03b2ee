"""How a run of the vision encoder reaches its layers, and how its outputs get their lengths back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from illava_hooks.merge.attention import attend_and_receive
from illava_hooks.merge.scoring import received_attention
from illava_hooks.merge.spans import scatter_back
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.patchers.vision.scores import LayerAttention
from illava_hooks.runtime.session import KEY

__all__ = ["Eavesdropper", "EncoderLayerHook", "EncoderStep", "current_run", "expand_output", "running"]

#: The run of the vision encoder that this thread is in; the feature methods have no other way to hand it over.
current_run: ContextVar[EncoderPass | None] = ContextVar("illava_encoder", default=None)


@dataclass(frozen=True, slots=True)
class EncoderStep:
    """What a merging layer finds in its keyword arguments."""

    run: EncoderPass
    layer_idx: int

    def watch(self, *projections: nn.Module) -> None:
        """Makes the outputs of the projections available to ``capture``."""
        for module in projections:
            self.run.session.hooks.capture(module)

    def listen(self) -> Eavesdropper:
        """A context for the stock attention in which scores may fall out of it."""
        return Eavesdropper(self.run.score is received_attention and self.run.removes(self.layer_idx))

    def merge(
        self, hidden: Tensor, project: Callable[[], tuple[Tensor, Tensor]], scale: float, heard: Eavesdropper
    ) -> Tensor:
        """Merges; ``project`` and ``scale`` as in ``LayerAttention``."""
        return self.run.merge(hidden, LayerAttention(self.layer_idx, project, scale, heard.received))


class Eavesdropper(TorchFunctionMode):
    """Takes the scores of ``received_attention`` out of the stock attention's own call, where that is possible.

    On a CPU, without gradients and masks, a call of SDPA is answered with the same attention in blocks, which sums
    the columns on the way. Any other call goes through, and the scores are taken from the projections afterwards.

    Attributes:
        received: for each answered call, ``(S, N)`` float32.
        attend: what answers.
    """

    attend = staticmethod(attend_and_receive)

    def __init__(self, wanted: bool) -> None:
        """Listens only if ``wanted``."""
        super().__init__()
        self.wanted = wanted
        self.received: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Every call of torch inside the context."""
        kwargs = kwargs or {}
        ours = self.wanted and func is scaled_dot_product_attention and len(args) == 3
        if not ours or not _is_plain(*args, **kwargs):
            return func(*args, **kwargs)
        query, key, value = args
        mixed, received = self.attend(query, key, value, kwargs.get("scale") or query.shape[-1] ** -0.5)
        self.received.append(received)
        return mixed


def _is_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether a call of SDPA is one that the blocks can answer."""
    tables = (query, key, value)
    return (
        attn_mask is None
        and not (dropout_p or is_causal or enable_gqa)
        and all(table.shape == query.shape and table.dtype == torch.float32 for table in tables)
        and query.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(table.requires_grad for table in tables))
    )


class EncoderLayerHook:
    """Pre-hook of every encoder layer: takes the pass out of the keyword arguments, puts the survivors' in."""

    def __init__(self, layer_idx: int) -> None:
        """Remembers which layer it sits on."""
        self.layer_idx = layer_idx

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves the call alone when no pass travels with it."""
        run = kwargs.pop(KEY, None)
        if run is None:
            return None
        kwargs = run.enter(self.layer_idx, kwargs)
        if self.layer_idx in run.layers:
            kwargs = {**kwargs, KEY: EncoderStep(run, self.layer_idx)}
        return args, kwargs


@contextmanager
def running(run: EncoderPass) -> Iterator[None]:
    """Makes ``run`` the current one of this thread or task."""
    token = current_run.set(run)
    try:
        yield
    finally:
        current_run.reset(token)


def expand_output(run: EncoderPass, output: Any) -> None:
    """Gives ``last_hidden_state`` and ``hidden_states`` of the encoder their unpatched length back."""
    if output.last_hidden_state is not None:
        output.last_hidden_state = _expand(run, output.last_hidden_state, len(run.plans))
    if output.hidden_states is not None:
        output.hidden_states = tuple(
            None if hidden is None else _expand(run, hidden, run.ordinal(index))
            for index, hidden in enumerate(output.hidden_states)
        )


def _expand(run: EncoderPass, hidden: Tensor, ordinal: int) -> Tensor:
    owner, width = run.states[ordinal].owner, hidden.shape[-1]
    units = hidden.reshape(run.num_rows, -1, run.traits.unit * width)
    if units.shape[1] == owner.shape[1]:
        return hidden
    return scatter_back(units, owner.to(hidden.device)).reshape(*hidden.shape[:-2], -1, width)
