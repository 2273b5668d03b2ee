"""In front of vLLM's processors: placeholder counts of survivors, and a request's strength on its items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any, get_args

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from illava_hooks.config import Modality
from illava_hooks.errors import MergeConfigError
from illava_hooks.integrations.vllm.counts import KeptCounts
from illava_hooks.integrations.vllm.settings import AS_SERVED, KEY, Settings, Strength, settings_of, take_strength

__all__ = ["MergingInfo", "MergingProcessor", "SpacedDummies", "strength_of"]


def strength_field(modality: Modality) -> str:
    """Where an item carries the strength of its request."""
    return f"{modality}_{KEY}"


class MergingInfo:
    """In front of a processing info: knows the settings; without them everything is stock."""

    @cached_property
    def merging(self) -> Settings | None:
        """The settings of the model, or None."""
        return settings_of(_stock(self).get_hf_config())

    @cached_property
    def kept_tokens(self) -> KeptCounts:
        """The counts at these settings."""
        assert self.merging is not None
        return KeptCounts(self.merging, _stock(self).get_hf_config())

    @property
    def model_id(self) -> str:
        """With the settings behind it: it goes into each item's hash, by which encoder and KV caches find it."""
        name: str = super().model_id  # type: ignore[misc]  # of the class behind
        return name if self.merging is None else f"{name}#{KEY}-{self.merging.digest}"

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """While the context is open, stock does not see the rate by which positions are made to follow pictures.

        It is there where the model runs in this process, and some processors would prune videos by it.
        """
        config = _stock(self).ctx.get_mm_config()
        rate, config.video_pruning_rate = config.video_pruning_rate, None
        try:
            yield
        finally:
            config.video_pruning_rate = rate


class SpacedDummies:
    """In front of what writes vLLM's own prompts for its warm-up, in which items of two kinds would touch."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """As stock, with a full stop between any two items."""
        stock = super().get_dummy_text  # type: ignore[misc]  # of the class behind
        if _stock(self).info.merging is None:
            return str(stock(mm_counts))
        return ".".join(stock({modality: 1}) for modality, count in mm_counts.items() for _ in range(count))


class MergingProcessor:
    """In front of a multi-modal processor.

    Attributes:
        apart: whether two items need a token between them.
    """

    apart = True

    def shape_of(self, modality: Modality, item: Any) -> Sequence[int]:
        """What the family counts an item by; a subclass says it."""
        raise NotImplementedError

    def spans_of(self, modality: Modality, item: Any) -> int:
        """How many runs of visual tokens stand for an item in the prompt, equally long each."""
        return 1

    def items_in(self, modality: Modality, inputs: Mapping[str, Any]) -> int:
        """How many items of a modality the processor has made; a subclass says it."""
        raise NotImplementedError

    def _apply_hf_processor_main(self, mm_items: Any, **named: Mapping[str, object]) -> Any:
        ((name, given),) = named.items()  # a request's arguments, whose name is another one in older versions
        arguments, strength = take_strength(given)
        settings = _stock(self).info.merging
        if settings is None:
            if strength != AS_SERVED:
                raise MergeConfigError(
                    f"the request says {strength}, and this server was started without {KEY} in --hf-overrides; start "
                    "it with settings, or leave the strength out"
                )
            return super()._apply_hf_processor_main(mm_items, **named)  # type: ignore[misc]  # of the class behind
        settings.at(strength)
        with _stock(self).info.unpruned():
            inputs = super()._apply_hf_processor_main(mm_items, **{name: arguments})  # type: ignore[misc]
        for modality in get_args(Modality):
            if f"{modality}_embeds" in inputs:
                raise MergeConfigError(
                    f"{modality}_embeds is given: ready-made embeddings are not merged here; give pixels"
                )
            if self.items_in(modality, inputs):
                inputs[strength_field(modality)] = torch.tensor(strength.to_numbers())
        return inputs

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        # Stock is not to wonder about names that are none of its own.
        names = {modality: strength_field(modality) for modality in get_args(Modality)}
        own = {name: hf_inputs.pop(name) for name in names.values() if name in hf_inputs}
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        for modality, name in names.items():
            if name in own:  # shared: vLLM batches items of equal strength only
                hf_inputs[name] = own[name]
                count = self.items_in(modality, hf_inputs)
                fields[name] = MultiModalFieldConfig.shared(modality, count, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        info = _stock(self).info
        if info.merging is None:
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        arguments, strength = take_strength(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, arguments, out_mm_kwargs)  # type: ignore[misc]

        def changed(update: Any) -> Any:
            def replacement(index: int) -> Any:
                modality, item = update.modality, out_mm_kwargs[update.modality][index]
                count = info.kept_tokens(modality, self.shape_of(modality, item), strength)
                with info.unpruned():
                    return shortened(update.replacement(index), count, self.spans_of(modality, item))

            return replace(update, replacement=replacement)

        return [changed(update) for update in updates]

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, and refuses two items with nothing between them: which is which would be lost in positions."""
        prompt = super().apply(*args, **kwargs)  # type: ignore[misc]
        if self.apart and _stock(self).info.merging is not None:
            ranges = [place for places in prompt["mm_placeholders"].values() for place in places]
            ends = {place.offset + place.length for place in ranges}
            if any(place.offset in ends for place in ranges):
                raise MergeConfigError(
                    "two images or videos follow each other in the prompt without a token between them; put one "
                    "there, as chat templates do"
                )
        return prompt


def shortened(replacement: Any, count: int, spans: int = 1) -> Any:
    """What stands for an item in the prompt, with ``count`` visual tokens.

    Args:
        replacement: ids, all of them visual tokens, or vLLM's details of ids of which some are.
        count: how many are left.
        spans: in how many runs they stand, equally long each.

    Raises:
        MergeConfigError: they stand in another number of runs.
    """
    if isinstance(replacement, list):
        return replacement[:count]
    ids = list(replacement.full)
    token = int(torch.tensor(ids).mode().values)
    runs = [(other, len(list(same))) for other, same in groupby(ids)]
    if sum(other == token for other, _ in runs) != spans or count % spans:
        raise MergeConfigError(
            "this model has separators between an image's tokens, which the plugin cannot place yet"
        )
    kept = [other for other, length in runs for _ in range(count // spans if other == token else length)]
    return PromptUpdateDetails.select_token_id(kept, token)


def strength_of(modality: Modality, arguments: dict[str, Any]) -> Strength:
    """The strength of a batch of items, taken out of the model's arguments; without one, as the server says."""
    field = arguments.pop(strength_field(modality), None)
    return AS_SERVED if field is None else Strength.from_numbers(field.flatten().tolist())


def _stock(part: Any) -> Any:
    """The same object, as the class of vLLM's that stands behind the one of ours."""
    return part
