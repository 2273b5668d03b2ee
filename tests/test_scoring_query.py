"""Which token ranks: the first asked one, whatever the form in which it is asked, and never one before the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_utils
from torch import Tensor
from transformers import Trainer, TrainingArguments

from decode_helpers import IMAGE, IMAGES, RICHEST, SETTINGS, TEXT, patched, single
from families import families_and
from helpers import assert_differ
from illava_hooks import merging, patch
from kind_helpers import CLOSE, PADDED, outputs, said
from tiny_models import FAMILIES, FIRST_TEXT_ID, Inputs, Sample, inputs_for, tiny_model

#: Enough text behind the image for several answers.
LONG = Sample(text_seed=3, images=((32, 90),), text=(5, 20))
OTHER = Sample(text_seed=8, images=((48, 30), (30, 30)), text=(3, 4, 24))
SAMPLES = {"image": LONG, "images": OTHER, "video and image": Sample(5, ((60, 40),), (4,), (2, 3, 21), "vi")}

#: Older releases take ints and 1-D tensors only.
two_dimensional = pytest.mark.skipif(
    not hasattr(transformers.modeling_utils, "slice_logits_to_keep"), reason="this release takes no columns by row"
)

Form = Callable[[int, int], Any]
#: Every form of "the last k of n columns" that stock takes.
FORMS: dict[str, Form] = {
    "columns": lambda n, k: torch.arange(n - k, n),
    "columns from the end": lambda n, k: torch.arange(-k, 0),
    "int32 columns": lambda n, k: torch.arange(-k, 0, dtype=torch.int32),
    "columns, last first": lambda n, k: torch.arange(n - k, n).flip(0),
    "list": lambda n, k: list(range(n - k, n)),
    "range": lambda n, k: range(n - k, n),
    "array": lambda n, k: np.arange(n - k, n),
    "slice": lambda n, k: slice(n - k, n),
    "slice from the end": lambda n, k: slice(-k, None),
    "negative int": lambda n, k: k - n,
    "mask": lambda n, k: torch.arange(n) >= n - k,
    "array of bools": lambda n, k: np.arange(n) >= n - k,
}
BY_ROW: dict[str, Form] = {
    "columns by row": lambda n, k: torch.arange(n - k, n)[None],
    "mask by row": lambda n, k: (torch.arange(n) >= n - k)[None],
}


def behind_visuals(inputs: Inputs, row: int = 0) -> int:
    """The first column behind the last placeholder of a row."""
    ids = inputs["input_ids"][row]
    return int(((ids == 5) | (ids == 6)).nonzero().max()) + 1


def width(inputs: Inputs) -> int:
    return inputs["input_ids"].shape[1]


def one_row(logits: Tensor) -> Tensor:
    """The kept columns of the only row; a mask by row and single columns come with fewer dimensions."""
    return logits.reshape(-1, logits.shape[-1])


# ------------------------------------------------------------------------------ equal forms, equal answers


def check_form(family: str, form: Form, sample: Sample, keep: int, flipped: bool = False) -> None:
    model = patched(family)
    inputs = single(model, sample)
    expected, hidden = outputs(model, inputs, logits_to_keep=keep)
    found, ours = outputs(model, inputs, logits_to_keep=form(width(inputs), keep))
    found = one_row(found).flip(0) if flipped else one_row(found)
    torch.testing.assert_close(found, expected[0], **CLOSE)
    torch.testing.assert_close(ours, hidden, **CLOSE)
    if keep > 1:
        assert_differ(outputs(model, inputs, logits_to_keep=1)[1], hidden)


@pytest.mark.parametrize("keep", [1, 12])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_columns_in_every_form(family: str, form: str, keep: int) -> None:
    check_form(family, FORMS[form], LONG, keep, flipped=form == "columns, last first")


@pytest.mark.parametrize("form", ["columns from the end", "slice", "mask"])
@pytest.mark.parametrize(("family", "sample"), families_and(["images", "video and image"], SAMPLES))
def test_the_last_columns_behind_other_visuals(family: str, form: str, sample: str) -> None:
    check_form(family, FORMS[form], SAMPLES[sample], 5)


@two_dimensional
@pytest.mark.parametrize("keep", [1, 12])
@pytest.mark.parametrize("form", BY_ROW)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_columns_by_row(family: str, form: str, keep: int) -> None:
    check_form(family, BY_ROW[form], LONG, keep)


#: Forms of one column, counted from the end.
ONE: dict[str, Form] = {
    "tensor": lambda n, k: torch.tensor(n - k),
    "tensor from the end": lambda n, k: torch.tensor(-k),
    "numpy's int": lambda n, k: np.int64(n - k),
    "numpy's int from the end": lambda n, k: np.int64(-k),
    "array": lambda n, k: np.array(-k),
}


@pytest.mark.parametrize("column", [1, 11])
@pytest.mark.parametrize("form", ONE)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_column_without_a_dimension(family: str, form: str, column: int) -> None:
    """It is that column, not so many of them; it ranks."""
    model = patched(family)
    inputs = single(model, LONG)
    with torch.no_grad():
        out = model(**inputs, logits_to_keep=ONE[form](width(inputs), column), output_hidden_states=True)
    expected, hidden = outputs(model, inputs, logits_to_keep=column)
    torch.testing.assert_close(out.hidden_states[-1], hidden, **CLOSE)
    torch.testing.assert_close(one_row(out.logits), expected[0, :1], **CLOSE)


#: Columns with gaps, from the end; the first of them in the sequence is the ninth from there.
SCATTERED: dict[str, Form] = {
    "columns": lambda n, k: torch.tensor([n - 9, n - 4, n - 1]),
    "columns in any order": lambda n, k: torch.tensor([n - 1, n - 9, n - 4]),
    "from both ends": lambda n, k: torch.tensor([-1, n - 9, -4]),
    "list": lambda n, k: [n - 9, -4, -1],
    "mask": lambda n, k: torch.tensor([column in (n - 9, n - 4, n - 1) for column in range(n)]),
    "slice with a step": lambda n, k: slice(n - 9, n, 4),
    "twice the same": lambda n, k: torch.tensor([-9, -9, -4]),
}


@pytest.mark.parametrize("form", SCATTERED)
@pytest.mark.parametrize("family", FAMILIES)
def test_scattered_columns(family: str, form: str) -> None:
    model = patched(family)
    inputs = single(model, LONG)
    given = SCATTERED[form](width(inputs), 0)
    whole, hidden = outputs(model, inputs, logits_to_keep=9)
    found, ours = outputs(model, inputs, logits_to_keep=given)
    torch.testing.assert_close(ours, hidden, **CLOSE)
    columns = torch.arange(width(inputs))[given] - (width(inputs) - 9)
    torch.testing.assert_close(found[0], whole[0, columns], **CLOSE)


@pytest.mark.parametrize("form", ["columns", "columns from the end", "list", "slice", "mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_the_first_asked_token_ranks_nothing(family: str, form: str) -> None:
    """The answer may be any: neither the prompt's logits nor those of the first asked column move."""
    model = patched(family)
    inputs = single(model, LONG)
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][:, -5:] = torch.tensor([30, 41, 52, 63, 74])
    keep = FORMS[form](width(inputs), 6)
    (found, hidden), (expected, theirs) = (outputs(model, x, logits_to_keep=keep) for x in (other, inputs))
    torch.testing.assert_close(found[:, 0], expected[:, 0], **CLOSE)
    torch.testing.assert_close(hidden[:, :-5], theirs[:, :-5], **CLOSE)
    assert_differ(outputs(model, other)[1][:, :-5], outputs(model, inputs)[1][:, :-5])


# -------------------------------------------------------------------------------- in front of the visuals

#: Asked columns of which the first lies in front of the last visual token, given the first column behind it.
IN_FRONT: dict[str, Callable[[int, int], Any]] = {
    "everything, as an int": lambda n, b: n,
    "everything, as columns": lambda n, b: torch.arange(n),
    "everything, as a slice": lambda n, b: slice(0, n),
    "everything, as a mask": lambda n, b: torch.ones(n, dtype=torch.bool),
    "more than there is": lambda n, b: n + 5,
    "the image's last but one": lambda n, b: n - b + 2,
    "the first and the last": lambda n, b: torch.tensor([0, n - 1]),
    "from the middle of the image": lambda n, b: slice(b - 9, None),
    "from the third, negative": lambda n, b: -3,
}


@pytest.mark.parametrize("form", IN_FRONT)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_query_in_front_of_the_visuals(family: str, form: str) -> None:
    """Such a query sees no image: the first token behind it ranks instead."""
    model = patched(family)
    inputs = single(model, LONG)
    n, behind = width(inputs), behind_visuals(inputs)
    given = IN_FRONT[form](n, behind)
    found, hidden = outputs(model, inputs, logits_to_keep=given)
    _, expected = outputs(model, inputs, logits_to_keep=n - behind)
    torch.testing.assert_close(hidden, expected, **CLOSE)
    torch.testing.assert_close(found[:, -1], model.lm_head(expected)[:, -1].detach(), **CLOSE)
    assert_differ(outputs(model, inputs, logits_to_keep=1)[1], expected)


@pytest.mark.parametrize("form", ["columns", "mask", "slice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_between_two_visuals_is_in_front_of_one(family: str, form: str) -> None:
    model = patched(family)
    inputs = single(model, OTHER)
    n, behind = width(inputs), behind_visuals(inputs)
    first = int((inputs["input_ids"][0] == 5).nonzero().min())
    between = first + int((inputs["input_ids"][0, first:behind] >= FIRST_TEXT_ID).nonzero().min())
    assert first < between < behind - 1
    _, hidden = outputs(model, inputs, logits_to_keep=FORMS[form](n, n - between))
    _, expected = outputs(model, inputs, logits_to_keep=n - behind)
    torch.testing.assert_close(hidden, expected, **CLOSE)


# ---------------------------------------------------------------------------------------- padded batches

BATCHES = {
    "a longer row of text": [Sample(text_seed=2, text=(290,)), LONG],
    "two images": [LONG, OTHER],
    "three rows": [OTHER, TEXT, LONG],
    "two of a size": [LONG, Sample(text_seed=9, images=((32, 90),), text=(3, 12))],
}


def check_rows(family: str, batch: str, side: Any, keep: Any, alone_keep: Callable[[int], Any]) -> None:
    """Each row's hidden states and kept logits are those of its single run."""
    model = patched(family)
    inputs = inputs_for(model, BATCHES[batch], side=side)
    n = width(inputs)
    logits, hidden = outputs(model, inputs, logits_to_keep=keep)
    kept = torch.arange(n)[-keep:] if isinstance(keep, int) else torch.arange(n)[keep]
    for row, sample in enumerate(BATCHES[batch]):
        alone = single(model, sample)
        given = {} if sample.kinds == "" else {"logits_to_keep": alone_keep(width(alone))}
        expected = outputs(model, alone, **given)[1][0]
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(hidden[row][real], expected, **PADDED)
        wanted = model.lm_head(expected).detach()
        place = torch.full((n,), -1).masked_scatter(real, torch.arange(len(expected)))[kept]
        torch.testing.assert_close(logits[row][place >= 0], wanted[place[place >= 0]], **PADDED)


@pytest.mark.parametrize("keep", [1, 15])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_number_for_all_rows(family: str, batch: str, side: str, keep: int) -> None:
    """It counts from each row's own last real token, on whichever side the padding is."""
    check_rows(family, batch, side, keep, lambda n: keep)


@pytest.mark.parametrize("form", ["columns", "columns from the end", "slice from the end", "mask"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_columns_of_left_padded_rows(family: str, batch: str, form: str) -> None:
    n = width(inputs_for(tiny_model(family), BATCHES[batch]))
    check_rows(family, batch, "left", FORMS[form](n, 6), lambda alone: torch.arange(alone - 6, alone))


@pytest.mark.parametrize("form", ["columns", "mask", "slice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_columns_of_right_padded_rows(family: str, form: str) -> None:
    """The same columns in each row, which is another distance from its end."""
    model = tiny_model(family)
    alone = [single(model, sample) for sample in BATCHES["two of a size"]]
    first = max(map(behind_visuals, alone)) + 2
    assert first < min(map(width, alone)) < max(map(width, alone))
    keep = FORMS[form](longest := max(map(width, alone)), longest - first)
    check_rows(family, "two of a size", "right", keep, lambda length: torch.arange(first, length))


@two_dimensional
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_columns_of_each_row(family: str, side: Any) -> None:
    """Each row asks for its own last four and ranks by the first of them."""
    model = patched(family)
    batch = BATCHES["two images"]
    inputs = inputs_for(model, batch, side=side)
    columns = torch.stack([row.nonzero().flatten()[-4:] for row in inputs["attention_mask"]])
    asked = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool).scatter(1, columns, True)
    for keep in (columns, asked):
        logits, hidden = outputs(model, inputs, logits_to_keep=keep)
        logits = logits.reshape(2, 4, -1)
        for row, sample in enumerate(batch):
            expected, theirs = outputs(model, single(model, sample), logits_to_keep=4)
            torch.testing.assert_close(logits[row], expected[0], **PADDED)
            torch.testing.assert_close(hidden[row][inputs["attention_mask"][row].bool()], theirs[0], **PADDED)


# ------------------------------------------------------------------------------------------------ labels


def answers(inputs: Inputs, count: int = 6) -> Tensor:
    """Labels on the last real tokens of each row."""
    mask = inputs["attention_mask"]
    from_end = mask.flip(1).cumsum(1).flip(1)
    return torch.where(mask.bool() & (from_end <= count), inputs["input_ids"], -100)


def shifted(labels: Tensor) -> Tensor:
    """Labels one to the left, as sequence parallel training gives them."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


#: How a call is told what the answer is.
TOLD: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "labels": lambda labels: {"labels": labels},
    "both": lambda labels: {"labels": labels, "shift_labels": shifted(labels)},
    "shifted labels": lambda labels: {"shift_labels": shifted(labels)},
}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_padded_rows(family: str, side: Any, told: str) -> None:
    """Each row as alone; and alone as asked for by number: the token before the first label ranks."""
    model = patched(family)
    batch = [LONG, OTHER, IMAGE]
    inputs = inputs_for(model, batch, side=side)
    _, hidden = outputs(model, inputs, **TOLD[told](answers(inputs)))
    for row, sample in enumerate(batch):
        alone = single(model, sample)
        expected = outputs(model, alone, logits_to_keep=7)[1][0]
        torch.testing.assert_close(hidden[row][inputs["attention_mask"][row].bool()], expected, **PADDED)


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize(("family", "sample"), families_and(SAMPLES))
def test_an_answer_does_not_rank_its_prompt(family: str, sample: str, told: str) -> None:
    """Changing nothing but the answer's tokens changes no logit of the prompt."""
    model = patched(family)
    inputs = single(model, SAMPLES[sample])
    labels = answers(inputs)
    other = {
        **inputs,
        "input_ids": torch.where(labels != -100, (inputs["input_ids"] + 7).clamp(20, 119), inputs["input_ids"]),
    }
    found, expected = (outputs(model, x, **TOLD[told](labels))[0] for x in (other, inputs))
    torch.testing.assert_close(found[:, :-6], expected[:, :-6], **CLOSE)
    assert_differ(outputs(model, other)[0][:, :-6], outputs(model, inputs)[0][:, :-6])


# ------------------------------------------------------------------------------- answers that nobody tells of

TRAINING = ("answer",)


def step(model: Any, inputs: Inputs, **kwargs: Any) -> None:
    model(**inputs, **kwargs).logits.sum().backward()


@pytest.mark.parametrize("call", ["model", "forward", "with a loss of its own", "base model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_without_labels_is_said_once(family: str, call: str, caplog: pytest.LogCaptureFixture) -> None:
    model = patched(family).train()
    inputs = single(model, LONG)
    for _ in range(3):
        if call == "model":
            step(model, inputs)
        elif call == "forward":
            model.forward(**inputs).logits.sum().backward()
        elif call == "base model":
            model.model(**inputs).last_hidden_state.sum().backward()
        else:
            logits = model(**inputs).logits
            torch.nn.functional.cross_entropy(logits[0, -7:-1], inputs["input_ids"][0, -6:]).backward()
    assert len(said(caplog, *TRAINING)) == 1
    (message,) = said(caplog, *TRAINING)
    assert "labels" in message and "logits_to_keep" in message and "\n" not in message


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("how", ["label smoothing", "a loss function"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_that_keeps_labels_to_itself(
    family: str, how: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes them out of the call, so that nobody can know which tokens are the answer."""
    model = patched(family)
    inputs = single(model, LONG)
    inputs["labels"] = answers(inputs)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        label_smoothing_factor=0.1 if how == "label smoothing" else 0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )

    def own_loss(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    loss = own_loss if how == "a loss function" else None
    trainer = Trainer(model, arguments, lambda rows: rows[0], [inputs] * 2, compute_loss_func=loss)
    trainer.train()
    assert len(said(caplog, *TRAINING)) == 1


#: Calls in which nothing is trained on an answer that nobody told of.
FINE: dict[str, Callable[[Any, Inputs], Any]] = {
    "labels": lambda model, x: step(model, x, labels=answers(x)),
    "shifted labels": lambda model, x: step(model, x, shift_labels=shifted(answers(x))),
    "columns": lambda model, x: step(model, x, logits_to_keep=torch.arange(-7, 0)),
    "a number of columns": lambda model, x: step(model, x, logits_to_keep=7),
    "evaluation": lambda model, x: step(model.eval(), x),
    "no gradients": lambda model, x: torch.no_grad()(model)(**x),
    "generate": lambda model, x: model.generate(**x, max_new_tokens=2),
    "text": lambda model, x: step(model, single(model, TEXT)),
}


@pytest.mark.parametrize("call", FINE)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_said_where_nothing_is_wrong(family: str, call: str, caplog: pytest.LogCaptureFixture) -> None:
    model = patched(family).train()
    FINE[call](model, single(model, LONG))
    assert not said(caplog, *TRAINING)


@pytest.mark.parametrize("why", ["the encoder alone merges", "switched off", "ratio 1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_said_where_no_query_ranks(family: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, dict[str, Any]] = {
        "the encoder alone merges": {"llm_layers": []},
        "ratio 1": {"llm_ratio": 1.0},
    }
    model = tiny_model(family).train()
    patch(model, **{**SETTINGS[family], **changes.get(why, {})})
    with merging(model, why != "switched off"):
        step(model, single(model, RICHEST[family]))
    assert not said(caplog, *TRAINING)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_patch_says_it_again(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Once for each session."""
    model = patched(family).train()
    for expected in (1, 2):
        step(model, single(model, IMAGES))
        step(model, single(model, IMAGE))
        assert len(said(caplog, *TRAINING)) == expected
        patch(model, **SETTINGS[family])
