"""Methods: names for the four choices (encoder score, language-model score, merge rule, layout)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from illava_hooks.errors import MergeConfigError
from illava_hooks.merge.plan import Fold, SegmentPlan
from illava_hooks.merge.rule_inputs import RuleInputs
from illava_hooks.merge.rules import KEYLESS_RULES, RULES, MergeRule
from illava_hooks.merge.scores import PLACE_SCORES, SCORES, Score, ScoreInputs

__all__ = [
    "ABOUT",
    "DEFAULT_METHOD",
    "ENCODER_SCORES",
    "LLM_SCORES",
    "METHODS",
    "DefaultMethod",
    "Layout",
    "Method",
    "checked_scores",
    "resolve_method",
]

Layout = Literal["aligned", "compact"]

#: The family decides: what its published code ranks by.
PUBLISHED = "published"

ENCODER_SCORES = ("received_attention", "query_lse", "random", "uniform")
LLM_SCORES = ("last_query_attention", "query_lse", "random", "uniform")


@dataclass(frozen=True, slots=True)
class Method:
    """What is scored, how it is merged, how survivors are laid out.

    Attributes:
        name: shown in reports.
        encoder_score: one of ``ENCODER_SCORES`` or a function of ``ScoreInputs`` that returns ``(S, N)`` scores,
            higher = keep.
        llm_score: one of ``LLM_SCORES`` or such a function.
        merge: ``"recycle"``, ``"cluster"``, ``"nearest"``, ``"diverse"``, ``"selective"``, ``"bipartite"``, ``"drop"``
            or a ``MergeRule``.
        layout: ``"aligned"``: survivors stay where they are; ``"compact"``: as in the published code.
        proportional: whether encoder layers behind a merge weigh each token by its size: the logarithm of its number
            of original tokens is added to its attention logits (ToMe, arXiv 2210.09461, equation 1). A back-end
            that takes no bias gives way to SDPA in those layers.
        quota: whether what a layout crops away of a tile (LLaVA-OneVision's unpadding) merges apart from what it
            shows, so that the length of the prompt follows from shapes alone. It keeps fewer tokens, since attention
            prefers what is shown.
        llm_merge: another merge rule for the language model; None: the same.

    Raises:
        MergeConfigError: a name is not known.
    """

    name: str
    encoder_score: str | Score = "received_attention"
    llm_score: str | Score = "last_query_attention"
    merge: str | MergeRule = "recycle"
    layout: Layout = "aligned"
    proportional: bool = False
    quota: bool = False
    llm_merge: str | MergeRule | None = None

    def __post_init__(self) -> None:
        """Refuses names that nothing stands behind."""
        _known("encoder_score", self.encoder_score, (*ENCODER_SCORES, PUBLISHED))
        _known("llm_score", self.llm_score, (*LLM_SCORES, PUBLISHED))
        _known("merge", self.merge, tuple(RULES))
        if self.llm_merge is not None:
            _known("llm_merge", self.llm_merge, tuple(RULES))
        if self.layout not in get_args(Layout):
            raise MergeConfigError(f"layout is {self.layout!r}; choose one of {list(get_args(Layout))}")

    @property
    def is_published(self) -> bool:
        """Whether the family replays the arithmetic of its published code."""
        return PUBLISHED in (self.encoder_score, self.llm_score)

    @property
    def in_llm(self) -> Method:
        """What the language model does: this method with the rule that merges there."""
        return self if self.llm_merge is None else replace(self, merge=self.llm_merge, llm_merge=None)

    @property
    def rule(self) -> MergeRule:
        """The encoder's merge rule as a function, where ``merge`` may be its name."""
        if isinstance(self.merge, str):
            return RULES[self.merge]
        return self.merge if self.merge in RULES.values() else partial(_checked_rule, self.name, self.merge)

    @property
    def listens_in_encoder(self) -> bool:
        """Whether queries or keys of merging encoder layers are looked at; by a function of the user's always."""
        return _listens(self.encoder_score, self.rule)

    @property
    def listens_in_llm(self) -> bool:
        """Whether queries or keys in front of merging decoder layers are; if not, no question decides what merges."""
        return _listens(self.llm_score, self.in_llm.rule)

    def max_removed(self, num_tokens: int) -> int:
        """How many of ``num_tokens`` the encoder can remove at once: by bipartite matching half, else all but one."""
        return num_tokens // 2 if self.merge == "bipartite" else num_tokens - 1

    def least_kept(self, num_layers: int) -> float:
        """The smallest fraction of many tokens that so many merging encoder layers can leave; 1 if there are none."""
        if not num_layers:
            return 1.0
        return 0.5**num_layers if self.merge == "bipartite" else 0.0


def find_score(choice: str | Score, published: str | None) -> Score:
    """The function behind a score's name; ``published`` is what the family's published code ranks by, if any."""
    if not isinstance(choice, str):
        return choice
    name = published if choice == PUBLISHED else choice
    if name is None:
        raise MergeConfigError(
            "method ranks as published, and there is no published code for this family; use another"
        )
    return SCORES[name]


def checked_scores(name: str, score: Score, inputs: ScoreInputs) -> Tensor:
    """A score's result as float32.

    Args:
        name: of the method, for the message.
        score: a score, perhaps the user's own.
        inputs: what it may look at.

    Raises:
        MergeConfigError: it is no tensor of one number per token, or a score of the user's is nothing but NaN on a
            CPU.
    """
    found = score(inputs)
    shape = tuple(inputs.positions.shape)
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise MergeConfigError(
            f"the score of method {name!r} returned {given} for tokens of shape {shape}; return one number per token"
        )
    if score not in SCORES.values() and _knows_nothing(found, inputs):
        raise MergeConfigError(
            f"the score of method {name!r} returned NaN for all {found.numel()} tokens; return numbers, and infinity "
            "for tokens that must stay"
        )
    return found.float()


def _knows_nothing(found: Tensor, inputs: ScoreInputs) -> bool:
    """Whether a score of the user's is NaN for every token, which is a mistake; one of NaN is unknown, and goes first.

    Not where broken pixels are the reason, and not asked where a device would have to be waited for.
    """
    if type(found) is not Tensor or found.device.type != "cpu" or torch.compiler.is_compiling() or not found.numel():
        return False
    return bool(found.isnan().all() and inputs.key.isfinite().all())


def _checked_rule(name: str, rule: MergeRule, inputs: RuleInputs) -> SegmentPlan | Fold:
    """What a rule of the user's decides, where it decides something."""
    found = rule(inputs)
    if not isinstance(found, SegmentPlan | Fold):
        raise MergeConfigError(
            f"the merge rule of method {name!r} returned {type(found).__name__}; return a SegmentPlan or a Fold"
        )
    return found


def _listens(score: str | Score, rule: MergeRule) -> bool:
    function = SCORES.get(score) if isinstance(score, str) else score
    return function not in PLACE_SCORES or rule not in KEYLESS_RULES


def _known(argument: str, value: object, names: tuple[str, ...]) -> None:
    if not callable(value) and value not in names:
        raise MergeConfigError(f"{argument} is {value!r}; choose one of {list(names)} or give a function")


#: Every method that has a name (read-only).
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("illava"),
            Method("illava-v2", merge="cluster"),
            Method("illava-reference", PUBLISHED, PUBLISHED, layout="compact"),
            Method("nearest", merge="nearest"),
            Method("diverse", merge="diverse", proportional=True),
            Method("novel", "uniform", merge="diverse", proportional=True),
            Method("novel-agnostic", "uniform", "uniform", merge="diverse", proportional=True),
            Method("selective", "uniform", "uniform", merge="selective", proportional=True, llm_merge="diverse"),
            Method("tome", "uniform", "uniform", merge="bipartite"),
            Method("fastv", merge="drop"),
            Method("random", "random", "random", merge="drop"),
        )
    }
)


#: What each method does, in a sentence, for `illava-hooks info`.
ABOUT: Mapping[str, str] = MappingProxyType(
    {
        "illava": "the tokens that receive the least attention become one weighted token (the paper's method)",
        "illava-v2": "as published at ICLR 2026: a few survivors take up their most similar redundant tokens",
        "illava-reference": "the arithmetic of the published code, for reproduction; its compact layout",
        "nearest": "every redundant token is averaged into its most similar survivor",
        "diverse": "keeps tokens that no better one resembles, and sizes count",
        "novel": "as diverse, without the encoder's attention",
        "novel-agnostic": "as novel in both stages, whatever the question: recommended where both stages merge",
        "selective": "as novel-agnostic, without averaging what is unlike: recommended where the encoder alone merges",
        "tome": "bipartite matching by key similarity, after ToMe (2022)",
        "fastv": "redundant tokens are dropped; with vit_r=0 this is FastV",
        "random": "random tokens are dropped, reproducibly: the baseline to beat",
    }
)


class DefaultMethod(str):
    """A name that was not given: unlike the same name given on purpose, it gives way to that of a preset's file."""

    __slots__ = ()


#: What merges where nothing is said.
DEFAULT_METHOD = DefaultMethod("illava")


def resolve_method(method: str | Method) -> Method:
    """Looks a method up by name; a ``Method`` passes through.

    Raises:
        MergeConfigError: the name is not known.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    raise MergeConfigError(f"method is {method!r}; choose one of {list(METHODS)} or give a Method object")
