"""Pictures that several prompts of a batch show go through the vision encoder once.

What the encoder makes of a picture, merging or not, does not depend on the question, and most suites ask several
questions about each picture. So the encoder runs on the distinct pictures of a batch, and its output, with what it
says of the merges, is handed to the language model as often as prompts show it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256
from typing import Any

from illava_hooks.api import session_of
from illava_hooks.config import Modality
from illava_hooks.engine.compat import takes_ready_features
from illava_hooks.engine.records import RECORDS, attach, records_of
from illava_hooks.engine.tooling import PIXELS
from illava_hooks.engine.transport import Generation, generating
from illava_hooks.tools.items import Item

__all__ = ["distinct", "repeated"]

#: Entries of a feature output that are either one for each picture, or nothing that the language model reads.
_KNOWN = {"pooler_output", "last_hidden_state", "hidden_states", "attentions", RECORDS}


def distinct(items: Sequence[Item]) -> tuple[list[int], list[int]]:
    """Which items bring pictures that none before them brings, and for each item which of those has its pictures."""
    first: list[int] = []
    seen: dict[Any, int] = {}
    places = []
    for index, item in enumerate(items):
        key = item.video, *((picture.shape, sha256(picture.tobytes()).digest()) for picture in item.pictures)
        if key not in seen:
            seen[key] = len(first)
            first.append(index)
        places.append(seen[key])
    return first, places


def repeated(model: Any, inputs: Any, few: Any, places: Sequence[int], item: Item) -> dict[str, Any] | None:
    """A batch's inputs with ready features in place of pixels.

    Args:
        model: any supported model, patched or not.
        inputs: of the whole batch.
        few: of the items with distinct pictures.
        places: for each prompt of the batch which of those has its pictures.
        item: any of them: all bring as many pictures, of one kind.

    Returns:
        The arguments of ``generate``; None where the model takes no ready features, or they are not one a picture.
    """
    if not takes_ready_features(model):
        return None
    modality: Modality = "video" if item.video else "image"
    name = f"get_{modality}_features"
    taken = inspect.signature(getattr(type(model.base_model), name)).parameters
    given = {key: few[key] for key in taken if key in few}
    session = session_of(model)
    # As inside of ``generate``, which hands features on as well: nobody need be told of features without a forward.
    with nullcontext() if session is None else generating(Generation(session, None)):
        output = getattr(model.base_model, name)(**given, return_dict=True)
    each, count = len(item.pictures), (max(places) + 1) * len(item.pictures)
    if set(output) - _KNOWN or len(output.pooler_output) != count:
        return None
    order = [place * each + number for place in places for number in range(each)]
    features = output.pooler_output
    ready = type(output)(
        pooler_output=[features[i] for i in order] if isinstance(features, list | tuple) else features[order]
    )
    if (records := records_of(output)) is not None:
        attach(ready, [records[i] for i in order])
    pixels = PIXELS[modality]
    return {**{key: value for key, value in inputs.items() if key != pixels}, "mm_encoder_outputs": {modality: ready}}
