"""Which token ranks the visual tokens when there are labels: the one before the first label behind the visuals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decode_helpers import BOTH, IMAGE, IMAGES, TEXT, patched, single
from families import families_and
from helpers import Found, assert_differ, assert_near, forward
from illava_hooks import session_of
from tiny_models import FAMILIES, FIRST_TEXT_ID, IMAGE_ID, VIDEO_ID, Inputs, Sample, inputs_for

SAMPLES = {"image": IMAGE, "images": IMAGES, "video and image": BOTH}
ANSWER = 3


def behind_visuals(inputs: Inputs, row: int = 0) -> int:
    """The first position behind the last placeholder of a row."""
    ids = inputs["input_ids"][row]
    return int(((ids == IMAGE_ID) | (ids == VIDEO_ID)).nonzero().max()) + 1


def labels_of(inputs: Inputs, kind: str, answer: int = ANSWER) -> Tensor:
    """Labels of every row.

    Args:
        inputs: a batch.
        kind: "answer": the last tokens only; "before and answer": the text before the visuals too; "before": only
            that; "text": all text, without markers; "text behind": that behind the visuals; "everything": all
            tokens, also placeholders; "nothing": none.
        answer: tokens of the answer.
    """
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    asked = real & (ids >= FIRST_TEXT_ID)
    column = torch.arange(ids.shape[1])
    for row in range(len(ids)):
        end = int(real[row].nonzero().max()) + 1
        last = column >= end - answer
        start = behind_visuals(inputs, row) if (ids[row] < FIRST_TEXT_ID)[real[row]].any() else 0
        asked[row] &= {
            "answer": last,
            "before and answer": last | (column < start),
            "before": column < start,
            "text behind": column >= start,
            "nothing": column < 0,
        }.get(kind, column >= 0)
    return torch.where(real if kind == "everything" else asked, ids, -100)


def run(model: Any, inputs: Inputs, labels: Tensor | None) -> tuple[Found, list[Tensor]]:
    """All outputs but the loss, and the surviving seats of every visual after each merge."""
    given = {} if labels is None else {"labels": labels}
    found = forward(model, inputs, **given)
    found.pop("forward.loss", None)
    merges = [session_of(model).provenance.at("language", layer) for layer in (1, 3)]
    return found, [image.seats for merge in merges for image in merge.images]


def assert_alike(ours: tuple[Found, list[Tensor]], theirs: tuple[Found, list[Tensor]]) -> None:
    assert_near(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
    assert len(ours[1]) == len(theirs[1])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


def assert_no_tails(seats: list[Tensor], entered: list[Tensor]) -> None:
    """The survivors are not just the last ones that there were: somebody has looked."""
    for left, there in zip(seats, entered, strict=True):
        assert not torch.equal(left, there[len(there) - len(left) :])


@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_labels_before_the_visuals_do_not_rank(family: str, kind: str) -> None:
    model = patched(family, track=True)
    inputs = single(model, SAMPLES[kind])
    expected = run(model, inputs, labels_of(inputs, "answer"))
    found = run(model, inputs, labels_of(inputs, "before and answer"))
    assert (labels_of(inputs, "before and answer") != -100).sum() > ANSWER
    assert_alike(found, expected)
    entered = [image.seats for image in session_of(model).provenance.at("language", 0).images]
    assert_no_tails(found[1][: len(entered)], entered)
    unlabelled = run(model, inputs, None)
    assert_differ(unlabelled[0]["forward.hidden_states.4"], found[0]["forward.hidden_states.4"])


@pytest.mark.parametrize("labelled", ["text", "everything"])
@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_text_labelled_on_both_sides(family: str, kind: str, labelled: str) -> None:
    """Each text token is a label, or each token: the first one behind the visuals counts, markers included."""
    model = patched(family, track=True)
    inputs = single(model, SAMPLES[kind])
    labels = labels_of(inputs, labelled)
    later = labels.clone()
    later[:, : behind_visuals(inputs)] = -100
    assert (labels != later).any()
    assert_alike(run(model, inputs, labels), run(model, inputs, later))
    # By hand: with these labels the query is the token before the first of them.
    query = int((later[0] != -100).nonzero().min()) - 1
    keep = inputs["input_ids"].shape[1] - query
    by_logits = forward(model, inputs, logits_to_keep=keep)["forward.hidden_states.4"]
    torch.testing.assert_close(run(model, inputs, labels)[0]["forward.hidden_states.4"], by_logits)


@pytest.mark.parametrize("labelled", ["before", "nothing"])
@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_without_later_labels_the_last_token_ranks(family: str, kind: str, labelled: str) -> None:
    model = patched(family, track=True)
    inputs = single(model, SAMPLES[kind])
    labels = labels_of(inputs, labelled)
    assert (labels != -100).any() == (labelled == "before")
    assert_alike(run(model, inputs, labels), run(model, inputs, None))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_has_its_own_query(family: str, side: Any) -> None:
    """Rows with labels on both sides, behind, before and nowhere, in one padded batch, as each row alone."""
    little, late = Sample(text_seed=8, images=((30, 30),)), Sample(text_seed=9, images=((40, 64),), text=(2, 9))
    rows: list[tuple[Sample, str, str]] = [  # the labels in the batch, and those that rank alike
        (IMAGES, "before and answer", "answer"),
        (TEXT, "text", "text"),
        (IMAGE, "before", "nothing"),
        (little, "nothing", "nothing"),
        (late, "text", "text behind"),
    ]
    model = patched(family, track=True)
    inputs = inputs_for(model, [sample for sample, _, _ in rows], side=side)
    labels = torch.stack([labels_of(inputs, kind)[row] for row, (_, kind, _) in enumerate(rows)])
    logits = run(model, inputs, labels)[0]["forward.logits"]
    for row, (sample, _, kind) in enumerate(rows):
        alone = single(model, sample)
        given = None if kind == "nothing" else labels_of(alone, kind)
        expected = run(model, alone, given)[0]["forward.logits"][0] if sample is not TEXT else logits_of(model, alone)
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row][real], expected, atol=2e-4, rtol=0)


def logits_of(model: Any, inputs: Inputs) -> Tensor:
    return forward(model, inputs)["forward.logits"][0]
