"""ColQwen2 for retrieval: a Qwen2-VL whose tokens are all handed out as vectors, without a language-model head.

The retriever does not go through the feature methods: it calls the tower, puts the features among the embeddings and
calls the model inside with those. So the state of its forward is opened around the retriever itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.hookset import CALLED, Called, Hook, named_arguments
from illava_hooks.engine.model_hooks import AfterBase, merges
from illava_hooks.engine.scoring_query import ScoringQuery
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import Picture, PublishedShape, Workload
from illava_hooks.engine.transport import FORWARD, ForwardState, begin_forward, running_forward
from illava_hooks.patchers.qwen2_vl import Qwen2VL

__all__ = ["FAMILY", "ColQwen2"]


class ColQwen2(Qwen2VL):
    """The retriever's family: Qwen2-VL's encoder and decoder, another way in."""

    name = "colqwen2"
    title = "ColQwen2"
    model_types = ("colqwen2",)
    modalities = ("image",)
    head_methods = ()
    # It answers no questions: what is measured and drawn by them is not for it.
    shapes: Mapping[str, PublishedShape] = MappingProxyType({})
    lmms_eval = None
    vlmevalkit = ()

    def base(self, model: Any) -> Any:
        """The bare Qwen2-VL inside, whose tower the retriever calls itself."""
        return model.vlm

    def config(self, model: Any) -> Any:
        """The configuration of the Qwen2-VL inside."""
        return model.config.vlm_config

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture] | None:
        """None: its processor pads pages to one number of patches."""
        return None

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor] | None:
        """None: it has no prefill and decodes nothing."""
        return None

    def around(self, parts: ModelParts, session: MergeSession) -> bool:
        """What stands around the retriever."""
        hooks, retriever = session.hooks, session.root
        hooks.around_forward(retriever, BeforeRetriever(session), AfterBase())
        hooks.before(parts.base, PassForward(session))
        for part in (retriever, parts.base):
            hooks.swap(part, "_illava_session", session)
        return True


class BeforeRetriever(Hook):
    """Opens the state of a forward that brings a page; its last token ranks."""

    def __init__(self, session: MergeSession) -> None:
        """Belongs to one session."""
        self.session = session

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Before the forward."""
        named = named_arguments(module, args, kwargs)
        kwargs = {**kwargs, CALLED: Called(module)}
        ids = named.get("input_ids")
        if ids is not None and merges(self.session, named):
            forward = ForwardState(self.session, ScoringQuery())
            forward.placeholders["image"] = ids == module.config.vlm_config.image_token_id
            begin_forward(forward)
            kwargs[FORWARD] = forward
        return args, kwargs


class PassForward(Hook):
    """Hands the state on to the model inside, which hands it to its text model."""

    def __init__(self, session: MergeSession) -> None:
        """Belongs to one session."""
        self.session = session

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Before the forward."""
        forward = running_forward()
        if forward is None or forward.session is not self.session:
            return None
        return args, {**kwargs, FORWARD: forward}


FAMILY = ColQwen2()
