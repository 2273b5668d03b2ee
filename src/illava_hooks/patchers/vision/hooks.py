"""How a run of the vision encoder reaches its layers, and how its outputs get their lengths back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from illava_hooks.merge.scoring import received_attention
from illava_hooks.merge.spans import scatter_back
from illava_hooks.patchers.vision.listening import Eavesdropper
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.patchers.vision.scores import LayerAttention
from illava_hooks.runtime.session import KEY

__all__ = ["EncoderLayerHook", "EncoderStep", "current_run", "expand_output", "handed_out", "running"]

#: The run of the vision encoder that this thread is in; the feature methods have no other way to hand it over.
current_run: ContextVar[EncoderPass | None] = ContextVar("illava_encoder", default=None)


@dataclass(frozen=True, slots=True)
class EncoderStep:
    """What a layer finds in its keyword arguments that merges, or weighs merged tokens by size."""

    run: EncoderPass
    layer_idx: int

    @property
    def merges(self) -> bool:
        """Whether the layer merges."""
        return self.layer_idx in self.run.layers

    def watch(self, *projections: nn.Module) -> None:
        """Makes the outputs of the projections available to ``capture``."""
        for module in projections:
            self.run.session.hooks.capture(module)

    def listen(self) -> Eavesdropper:
        """A context for the stock attention: weighs tokens by size, lets scores fall out where it can."""
        wanted = self.merges and self.run.score is received_attention and self.run.removes(self.layer_idx)
        return Eavesdropper(wanted, self.run.log_sizes(self.layer_idx))

    def merge(
        self, hidden: Tensor, project: Callable[[], tuple[Tensor, Tensor]], scale: float, heard: Eavesdropper
    ) -> Tensor:
        """Merges; ``project`` and ``scale`` as in ``LayerAttention``."""
        attention = LayerAttention(self.layer_idx, project, scale, heard.received, heard.log_sizes)
        return self.run.merge(hidden, attention)


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
        if run.reaches(self.layer_idx):
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


def handed_out(run: EncoderPass, output: Any, return_dict: bool | None, config: Any) -> Any:
    """A feature output with its records; or the tuple that stock returns, where call or configuration say so."""
    if not (config.return_dict if return_dict is None else return_dict):
        return output.to_tuple()
    output[KEY] = run.records
    return output


def _expand(run: EncoderPass, hidden: Tensor, ordinal: int) -> Tensor:
    owner, width = run.states[ordinal].owner, hidden.shape[-1]
    units = hidden.reshape(run.num_rows, -1, run.traits.unit * width)
    if units.shape[1] == owner.shape[1]:
        return hidden
    return scatter_back(units, owner.to(hidden.device)).reshape(*hidden.shape[:-2], -1, width)
