"""sentence-transformers calls `forward` of the base model (embeddings) or of the head (scores)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from client_helpers import CLOSE, EMBEDDED, client, embedded, picture
from helpers import assert_differ
from illava_hooks import merging, patch, session_of, tiny, unpatch
from tiny_models import FAMILIES

st = client("sentence_transformers")
embedding_modules = client("sentence_transformers.sentence_transformer.modules")
scoring_modules = client("sentence_transformers.cross_encoder.modules")

ITEMS = [
    {"image": picture("scene.png"), "text": "how many triangles are there ?"},
    {"image": picture("digits.png"), "text": "which digit is first ?"},
    {"text": "describe the red circle"},
]
PAIRS = [(item, "yes or no ?") for item in ITEMS]


def transformer(family: str, task: str) -> Any:
    """The module that holds the model."""
    return embedding_modules.Transformer(
        str(tiny.folder(family)), transformer_task=task, model_kwargs={"dtype": torch.float32}
    )


def encoder(family: str) -> tuple[Any, Any]:
    """A bi-encoder that takes the last token, and the model in it."""
    module = transformer(family, "feature-extraction")
    pooling = embedding_modules.Pooling(module.get_embedding_dimension(), pooling_mode="lasttoken")
    return st.SentenceTransformer(modules=[module, pooling], device="cpu"), module.model


def scorer(family: str) -> tuple[Any, Any]:
    """A cross-encoder that compares two words, and the model in it."""
    module = transformer(family, "any-to-any")
    score = scoring_modules.LogitScore(true_token_id=35, false_token_id=36)
    client_model = st.CrossEncoder(modules=[module, score], device="cpu", activation_fn=torch.nn.Identity())
    return client_model, module.model


def run(client_model: Any, items: list[Any]) -> Tensor:
    """Embeddings or scores of some items."""
    method = client_model.predict if isinstance(client_model, st.CrossEncoder) else client_model.encode
    result: Tensor = method(items, convert_to_tensor=True, show_progress_bar=False)
    return result


def by_hand(client_model: Any, family: str, items: list[Any]) -> Tensor:
    """The same from a plain merging model that is called with what the client's own preprocessing gives."""
    plain, _ = embedded(family)
    inputs = {k: v for k, v in client_model.preprocess(items).items() if isinstance(v, Tensor)}
    last = inputs["attention_mask"].cumsum(1).argmax(1)[:, None, None]
    with torch.no_grad():
        if isinstance(client_model, st.CrossEncoder):
            logits = plain(**inputs, logits_to_keep=1).logits[:, -1]
            return logits[:, 35] - logits[:, 36]
        states = plain.model(**inputs).last_hidden_state
    return states.gather(1, last.expand(-1, -1, states.shape[-1]))[:, 0]


CASES = [(encoder, ITEMS), (scorer, PAIRS)]


@pytest.mark.parametrize(("make", "items"), CASES, ids=["embeddings", "scores"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages_merge(family: str, make: Any, items: list[Any]) -> None:
    client_model, model = make(family)
    stock = run(client_model, items)
    session = patch(model, **EMBEDDED[family])
    found = run(client_model, items[:2])
    assert session.report.kept_fraction < 0.5
    assert len(session.report.visuals) == 2
    torch.testing.assert_close(found, by_hand(client_model, family, items[:2]), **CLOSE)
    batch = run(client_model, items)
    torch.testing.assert_close(batch[:2], found, **CLOSE)
    torch.testing.assert_close(batch, torch.cat([run(client_model, [item]) for item in items]), **CLOSE)
    assert_differ(batch[:2], stock[:2])
    torch.testing.assert_close(batch[2:], stock[2:], **CLOSE)
    with merging(model, False):
        torch.testing.assert_close(run(client_model, items), stock, atol=0, rtol=0)
    unpatch(model)
    assert session_of(model) is None
    torch.testing.assert_close(run(client_model, items), stock, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_alone(family: str) -> None:
    client_model, model = encoder(family)
    stock = run(client_model, [picture()])
    session = patch(model, **EMBEDDED[family])
    found = run(client_model, [picture()])
    assert session.report.kept_fraction < 0.5
    torch.testing.assert_close(found, by_hand(client_model, family, [picture()]), **CLOSE)
    assert_differ(found, stock)
