"""What stands around the base model and the model with its head.

The base model's hooks open and close the state of a forward that merges, and see in between which images and videos
it brings and where their placeholders stand. The head's hooks know which token scores, and what ``generate`` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from illava_hooks.config import Modality
from illava_hooks.engine.cache import MergedLayer
from illava_hooks.engine.compat import cache_of
from illava_hooks.engine.family import Family
from illava_hooks.engine.hookset import CALLED, Called, Hook, named_arguments
from illava_hooks.engine.records import VisualRecord, attach, records_of, with_stock_keys, without_records
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.scoring_query import ScoringQuery
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import PIXELS
from illava_hooks.engine.trace import finish_vision
from illava_hooks.engine.transport import (
    FORWARD,
    QUERY,
    Asked,
    ForwardState,
    Generation,
    begin_forward,
    current_generation,
    end_forward,
    generating,
    in_features,
    running_forward,
)
from illava_hooks.errors import PatchStateError

__all__ = ["AfterBase", "AfterHead", "BaseMethods", "BeforeBase", "BeforeHead", "HeadMethods", "QuietFeatures"]


@dataclass(frozen=True, slots=True)
class _ReadyMade:
    """Features that a call brings bare, as a feature output holds them."""

    pooler_output: Any


def _ready(named: Mapping[str, Any]) -> Mapping[Modality, Any]:
    """The feature outputs that a call brings instead of pixels."""
    bare = named.get("image_hidden_states")  # what SmolVLM and Idefics3 of older releases take
    return named.get("mm_encoder_outputs") or ({} if bare is None else {"image": _ReadyMade(bare)})


def carried(named: Mapping[str, Any]) -> list[Modality]:
    """The modalities that a call brings."""
    ready = _ready(named)
    return [m for m, pixels in PIXELS.items() if named.get(pixels) is not None or ready.get(m) is not None]


def merges(session: MergeSession, named: Mapping[str, Any]) -> bool:
    """Whether a call merges anything."""
    modalities = carried(named)
    return bool(modalities) and session.active and any(not session.config.schedule(m).is_identity for m in modalities)


# ---------------------------------------------------------------------- the base model


class BeforeBase(Hook):
    """Opens the state of a forward that merges; leaves other calls alone."""

    def __init__(self, session: MergeSession, methods: BaseMethods) -> None:
        """Belongs to one session; ``methods`` know what features look like."""
        self.session, self.methods = session, methods

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Opens the state, if the call merges; tells ``CallForward`` that the hooks have run."""
        asked: Asked | None = kwargs.pop(QUERY, None)
        kwargs = {**kwargs, CALLED: Called(module)}
        named = named_arguments(module, args, kwargs)
        if asked is not None:
            asked.is_heard = True  # whether it merges or not: what counts is that this base is the patched one
        if merges(self.session, named):
            forward = ForwardState(self.session, ScoringQuery() if asked is None else asked.query)
            self._warn_of_answers(module, forward.query)
            for modality, ready in _ready(named).items():
                if ready is not None:
                    forward.records[modality] = self.methods.records(modality, ready)
            begin_forward(forward)
            kwargs[FORWARD] = forward
        elif self.methods.made_outside and named.get("inputs_embeds") is not None and not carried(named):
            self.methods.warn_of_embeds()
        return args, kwargs

    def _warn_of_answers(self, module: Any, query: ScoringQuery) -> None:
        config = self.session.config
        asks = bool(config.llm_layers) and config.method.listens_in_llm
        if not query.is_told and module.training and torch.is_grad_enabled() and asks:
            self.session.warn_once(
                "a training forward came without labels and logits_to_keep (label smoothing and own losses take the "
                "labels out): its last token ranks the visual tokens, so an answer may rank those of its own prompt; "
                "hand labels to the model, or use llm_layers=[] while training"
            )


class AfterBase(Hook):
    """Closes the state, also after an exception; a planned merge that did not run is an error.

    Feature outputs inside of the output get their stock keys back.
    """

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """After the forward; without an output where it failed."""
        forward: ForwardState | None = kwargs.get(FORWARD)
        if forward is None:
            return None
        end_forward(forward)
        if output[0] is None:
            return None
        if forward.run is None and forward.session.config.llm_layers:
            raise PatchStateError(
                "the language model was not reached by the visual tokens of this forward, and merged nothing; call "
                "patch(model, ...) again after wrapping or replacing parts of the model"
            )
        if forward.run is not None:
            forward.run.check_finished()
        return without_records(output[0])


class BaseMethods:
    """Around the base model's methods: collects what the text model must know about visual tokens."""

    def __init__(self, session: MergeSession, family: Family, base: Any) -> None:
        """Belongs to one session and its base model."""
        self.session, self.family, self.base = session, family, base
        self.behind = family.tokens_behind(base)
        # The feature method that was last called outside of a forward: said only once embeddings made of it come in.
        self.made_outside = ""

    def features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_*_features``: remembers the records for the forward that asked."""
        kwargs.pop(FORWARD, None)  # Qwen2-VL hands the keyword arguments of its forward on
        if in_features():  # one that another one calls has no records of its own
            return method(*args, **kwargs)
        output = method(*args, **kwargs)
        forward = running_forward()
        if forward is not None and forward.session is self.session:
            modality: Modality = "video" if "video" in method.__name__ else "image"
            forward.records[modality] = self.records(modality, output)
        elif current_generation() is None and self.session.active and self.session.config.llm_layers:
            self.made_outside = method.__name__
            if (
                getattr(method, "__self__", None) is not self.session.root
            ):  # else a head that is not patched may be generating
                self.warn_of_embeds()
        return output

    def warn_of_embeds(self) -> None:
        """Says once what features that were made outside of a forward are good for."""
        self.session.warn_once(
            f"{self.made_outside} was called outside of a forward: the vision encoder merges, but a language model "
            "that is given inputs_embeds made from the features cannot know where the visual tokens stand; hand the "
            "output on as mm_encoder_outputs, or give the model pixel_values"
        )

    def placeholders(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_placeholder_mask``, or what the family has in its place."""
        result = method(*args, **kwargs)
        forward = running_forward()
        if forward is not None and forward.session is self.session:
            call = inspect.signature(method).bind(*args, **kwargs).arguments
            forward.placeholders |= self.family.placeholder_masks(self.base, call, result)
        return result

    def visuals_in(self, output: Any) -> list[list[int]]:
        """As the family's."""
        return self.family.visuals_in(self.base, output)

    def records(self, modality: Modality, output: Any) -> list[VisualRecord]:
        """Records of a feature output; of one that carries none, every token counts as kept.

        Raises:
            PatchStateError: features and records do not fit each other.
        """
        known = records_of(output)
        lengths = [count + self.behind.get(modality, 0) for entry in self.visuals_in(output) for count in entry]
        if known is None:
            return [VisualRecord(modality, length) for length in lengths]
        if [record.num_tokens for record in known] != lengths:
            raise PatchStateError(
                f"mm_encoder_outputs[{modality!r}] has {len(lengths)} entries and {len(known)} records of what merged "
                "in them; where beams or num_return_sequences repeat them, patch the model with its head; else drop "
                "the records"
            )
        return known


class QuietFeatures:
    """Around ``get_*_features`` where the language model is left alone, and only the user reads records."""

    def __init__(self, session: MergeSession, shape: EncoderShape) -> None:
        """Belongs to one session; ``shape`` is what its report counts by."""
        self.session, self.shape = session, shape

    def features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stores the report; records become an attribute behind stock's keys."""
        output = method(*args, **kwargs)
        if (records := records_of(output)) is not None and not in_features():
            finish_vision(self.session, self.shape, records)
        return with_stock_keys(output)


# ---------------------------------------------------------------------- the model with its head


class BeforeHead(Hook):
    """Hands the scoring query down."""

    def __init__(self, session: MergeSession) -> None:
        """Belongs to one session."""
        self.session = session

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Puts the query among the arguments of the base model, if the call merges."""
        named = named_arguments(module, args, kwargs)
        kwargs = {**kwargs, CALLED: Called(module)}
        if merges(self.session, named):
            kwargs[QUERY] = Asked(self._query(named))
        return args, kwargs

    def _query(self, named: Mapping[str, Any]) -> ScoringQuery:
        """The prompt's last token in a generation without a cache, which sees all of it in each step; else as told."""
        length, generation = _length(named), current_generation()
        if generation is not None and cache_of(named) is None and _began(generation, self.session, named):
            return ScoringQuery(column=torch.tensor(generation.ids.shape[1] - 1))  # type: ignore[union-attr]
        return ScoringQuery.of_call(named, length)


class AfterHead(Hook):
    """A forward that was to merge, and whose base model did not know of it, is an error."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Looks whether the base model took the query; nothing to say where the forward failed."""
        asked: Asked | None = kwargs.get(QUERY)
        if asked is not None and not asked.is_heard and output[0] is not None:
            raise PatchStateError(
                "the base model did not merge: it was put in behind patch; call patch(model, ...) again after "
                "replacing parts of the model"
            )


def _length(named: Mapping[str, Any]) -> int:
    ids = named.get("input_ids")
    if ids is None:
        ids = named.get("inputs_embeds")
    return 0 if ids is None else int(ids.shape[1])


def _began(generation: Generation, session: MergeSession, named: Mapping[str, Any]) -> bool:
    """Whether a longer sequence of the same model goes on from a prompt, and is not another call's."""
    prompt, ids = generation.ids, named.get("input_ids")
    if prompt is None or generation.session is not session or ids is None or ids.shape[1] <= prompt.shape[1]:
        return False
    first_beams = ids[:: max(1, len(ids) // len(prompt)), : prompt.shape[1]]
    return torch.equal(first_beams, prompt)


class HeadMethods:
    """Around methods of the model with its head."""

    def __init__(self, session: MergeSession, visuals_in: Callable[[Any], list[list[int]]]) -> None:
        """Belongs to one session; ``visuals_in`` tells what the entries of a feature output hold."""
        self.session, self.visuals_in = session, visuals_in

    def generate(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``generate``: remembers the prompt, and lets caches of other calls read the mask anew."""
        if not self.session.active:
            return method(*args, **kwargs)
        _refuse_chunks(method, kwargs)
        for layer in getattr(cache_of(kwargs), "layers", ()):
            if isinstance(layer, MergedLayer):
                layer.forget_mask()
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with generating(Generation(self.session, prompt if isinstance(prompt, Tensor) else None)):
            return method(*args, **kwargs)

    def features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_*_features``: a tuple holds what stock puts into it, without our records."""
        output = method(*args, **kwargs)
        return without_records(output) if isinstance(output, tuple) else output

    def expand(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``_expand_multimodal_outputs``: records follow their features to beams and return sequences."""
        call = inspect.signature(method).bind(*args, **kwargs)
        outputs = call.arguments["mm_encoder_output"]
        known = {m: records for m, out in outputs.items() if (records := records_of(out)) is not None}
        shadow = {m: _Shadow(outputs[m].pooler_output) for m in known}
        sizes = {m: [len(entry) for entry in self.visuals_in(outputs[m])] for m in known}
        result = method(*args, **kwargs)
        call.arguments["mm_encoder_output"] = shadow
        method(*call.args, **call.kwargs)
        for modality, records in known.items():
            rest = iter(records)
            entries = [[*islice(rest, size)] for size in sizes[modality]]
            attach(result[modality], [record for index in shadow[modality].order() for record in entries[index]])
        return result


class _Shadow:
    """Stands in for a feature output: each image's features are its own number."""

    def __init__(self, features: Any) -> None:
        self._numbers = [torch.full((len(feature), 1), index) for index, feature in enumerate(features)]
        self.pooler_output: Any = torch.stack(self._numbers) if isinstance(features, Tensor) else self._numbers

    def order(self) -> list[int]:
        """Which entry stands where; one of a list is itself, also where it is empty."""
        numbers = {id(row): index for index, row in enumerate(self._numbers)}
        return [int(row.flatten()[0]) if len(row) else numbers[id(row)] for row in self.pooler_output]


def _refuse_chunks(generate: Any, kwargs: dict[str, Any]) -> None:
    own = getattr(generate.__self__, "generation_config", None)
    config = kwargs.get("generation_config") or own
    size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if size is not None and carried(kwargs):
        raise PatchStateError(
            f"prefill_chunk_size is {size}; the end of a chunk is not the end of the prompt, whose query decides what "
            "merges; use prefill_chunk_size=None or merging(model, False)"
        )
