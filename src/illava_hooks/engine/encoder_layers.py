"""How a run of the vision encoder reaches its layers, what a merging layer does, and how outputs get their lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from illava_hooks.engine.attention_tap import AttentionTap, TappedConfig
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.hookset import CALLED, Called, Hook, foreign_forward
from illava_hooks.engine.modules import inside
from illava_hooks.engine.records import attach, vision_provenance
from illava_hooks.engine.regions import in_region, region
from illava_hooks.engine.sdpa import without_plans
from illava_hooks.engine.session import MergeSession, SessionHook
from illava_hooks.engine.transport import ENCODER_RUN, MERGE_STEP, in_features, running
from illava_hooks.errors import UnsupportedModelError

__all__ = [
    "EncoderLayerHook",
    "MergeStep",
    "MergingLayer",
    "TowerHook",
    "change_layers",
    "expand_output",
    "handed_on",
    "run_features",
    "warn_of_direct_call",
]


@dataclass(frozen=True, slots=True)
class MergeStep:
    """What a layer finds in its keyword arguments that merges, or weighs merged tokens by size."""

    run: EncoderRun
    layer_idx: int

    def around(self, attend: Callable[[], Tensor]) -> Tensor:
        """What stands in a layer between its entry and its MLP.

        Args:
            attend: the layer up to there: returns the residual stream behind the attention.

        Returns:
            The residual stream, merged where the layer merges.
        """
        if (listener := self.run.tap(self.layer_idx)) is None:
            hidden = attend()
        else:
            with AttentionTap(listener):
                hidden = attend()
        return self.run.merge(self.layer_idx, hidden, listener) if self.run.merges_in(self.layer_idx) else hidden


class MergingLayer(nn.Module):
    """In front of a stock layer class: its forward merges between attention and MLP where a ``MergeStep`` comes along.

    Why a class and no hook: the residual stream between attention and MLP is a local variable of the stock forward.
    A subclass names the stock class behind this one and writes those two halves out; nothing else of the layer.
    """

    #: By which copies of a swapped class are found again.
    swapped_in = True
    #: The layer's attention, whose call is listened to.
    attention_name = "self_attn"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward where no step comes along."""
        step: MergeStep | None = kwargs.pop(MERGE_STEP, None)
        layer: Any = self
        if not isinstance(layer, MergingLayer):  # a tracer kept this method, and the class has been taken back
            return type(layer).forward(layer, *args, **kwargs)
        return super().forward(*args, **kwargs) if step is None else self.merging_forward(step, *args, **kwargs)

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The residual stream behind the attention."""
        raise NotImplementedError

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The layer's output from there."""
        raise NotImplementedError

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # taps and plans break graphs
    def merging_forward(self, step: MergeStep, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The stock forward with a merge in between."""
        # What the attention left is out of sight before the MLP, where memory peaks.
        return self.feed_forward(step.around(lambda: self.attend(hidden, *args, **kwargs)))


def change_layers(
    layers: Sequence[Sequence[nn.Module]],
    changed: Sequence[int],
    kinds: Mapping[type[nn.Module], type[MergingLayer]],
    session: MergeSession,
) -> None:
    """Makes encoder layers able to merge: their class is swapped, their attention can be listened to if need be.

    Args:
        layers: by index, the layer in each copy of the tower.
        changed: indices of the layers to change.
        kinds: the merging class of each stock class.
        session: owns the changes.

    Raises:
        UnsupportedModelError: somebody put a forward of their own on a layer.
    """
    for index in changed:
        for layer in layers[index]:
            if foreign_forward(layer):
                raise UnsupportedModelError(
                    f"vision encoder layer {index} ({type(layer).__name__}) has a forward of its own on the instance, "
                    "past which nothing can merge; call patch first, then wrap the layer, or take the wrapper off"
                )
            merging = next(kind for stock, kind in kinds.items() if isinstance(layer, stock))
            session.hooks.swap_class(layer, merging)
            if session.config.method.listens_in_encoder or session.config.method.proportional:
                attention = getattr(layer, merging.attention_name)
                session.hooks.swap(attention, "config", TappedConfig(attention.config))


class EncoderLayerHook(Hook):
    """Pre-hook of every encoder layer: takes the run out of the keyword arguments, puts the survivors' in."""

    def __init__(self, layer_idx: int) -> None:
        """Remembers which layer it sits on."""
        self.layer_idx = layer_idx

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the call alone when no run travels with it."""
        run: EncoderRun | None = kwargs.pop(ENCODER_RUN, None)
        return None if run is None else self._enter(module, run, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what a run knows is no business of a graph
    def _enter(self, module: Any, run: EncoderRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = run.enter(self.layer_idx, kwargs)
        if run.reaches(self.layer_idx) and isinstance(module, MergingLayer):  # else the run finds out that none merged
            args = (run.arrange(self.layer_idx, args[0]), *args[1:])
            kwargs = {**kwargs, MERGE_STEP: MergeStep(run, self.layer_idx)}
        return args, kwargs


def handed_on(layer: nn.Module, run: EncoderRun) -> dict[str, Any]:
    """The run among a layer's keyword arguments, for stacks of layers that hand none on in stock.

    A layer that was put in behind patch takes no run; if it was to merge, the run finds out.
    """
    hooks = (hook for part in inside(layer) for hook in part._forward_pre_hooks.values())
    return {ENCODER_RUN: run} if any(isinstance(hook, EncoderLayerHook) for hook in hooks) else {}


class TowerHook(SessionHook):
    """Pre-hook of the tower: a call from outside of the feature methods does not merge, and that is said."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Says what will not happen; changes no argument of stock's."""
        if not in_features() and self.session.active and self.session.config.vit_layers:
            warn_of_direct_call(self.session, module)
        return args, {**kwargs, CALLED: Called(module)}


def warn_of_direct_call(session: MergeSession, tower: nn.Module) -> None:
    """Says once that a tower that is called from outside of the feature methods merges nothing."""
    session.warn_once(
        f"the vision encoder {type(tower).__name__} was called directly and merges nothing there; call the model "
        "or its get_image_features, whose shapes are unpatched"
    )


def run_features(
    session: MergeSession,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: EncoderRun | None,
    config: Any,
    behind: Callable[[Any], None],
) -> Any:
    """Calls a feature method with a run of the encoder around it.

    Args:
        session: of the model.
        method: the stock feature method.
        args: its positional arguments.
        kwargs: its keyword arguments.
        run: the run; None: the modality does not merge.
        config: of the model, for what it returns.
        behind: what the family does with the output and the run before it is handed out.

    Returns:
        What stock returns, with records attached where that is possible.
    """
    with running(run):
        if run is None:
            # A tower compiled while it merged is told apart by what stands under this key, not by its absence.
            return method(*args, **{**kwargs, ENCODER_RUN: None})
        with without_plans(run.device, run.pairs) or nullcontext():
            output = method(*args, **{**kwargs, "return_dict": True, ENCODER_RUN: run})
    run.check_finished()
    with region("illava::records"):
        behind(output)
    if session.config.track:
        session.finish(None, vision_provenance(run.records))
    return_dict = kwargs.get("return_dict")
    if not (config.return_dict if return_dict is None else return_dict):
        return output.to_tuple()
    attach(output, run.records)
    return output


@in_region("illava::encoder_expand")
def expand_output(run: EncoderRun, output: Any) -> None:
    """Gives ``last_hidden_state`` and ``hidden_states`` of the encoder their unpatched length back."""
    if output.last_hidden_state is not None:
        output.last_hidden_state = run.expand(output.last_hidden_state, len(run.plans))
    if output.hidden_states is not None:
        output.hidden_states = tuple(
            None if hidden is None else run.expand(hidden, run.merges_before(index))
            for index, hidden in enumerate(output.hidden_states)
        )
