"""lmms-eval, as it is, scores merged models as `illava-hooks evaluate` does, question by question."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from families import LmmsEval, families, family_of
from illava_hooks import PRESETS, tiny
from illava_hooks.cli import app
from illava_hooks.tools.datasets import Item, scene_items
from illava_hooks.tools.evaluate import Row, budget_settings, read_rows

PYTHON = os.environ.get("ILLAVA_LMMS_PYTHON", "")
HOW = (
    "set ILLAVA_LMMS_PYTHON to the python of an environment that has lmms-eval 0.7, decord and this package: "
    "`make test-integrations` makes one"
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=HOW)]

TASK = Path(__file__).parent / "lmms_eval_task"
QUESTIONS = 60
KEPT = 1 / 3

FAMILIES = families(embedded=True, lmms_eval=True)


def harness_of(family: str) -> LmmsEval:
    """How the harness calls a family."""
    found = family_of(family).lmms_eval
    assert found is not None
    return found


def merge_arguments(family: str, published: bool) -> dict[str, Any]:
    """A budget's settings, as a command line spells them."""
    settings = budget_settings(PRESETS[f"{family}/tiny"]["image"], "both", KEPT)
    vit, llm = ("-".join(map(str, settings[name])) for name in ("vit_layers", "llm_layers"))
    if published:
        on = {"enable_illava_vit": True, "illava_vit_k": vit, "illava_vit_r": settings["vit_r"]}
        return on | {"enable_illava_llm": True, "illava_llm_k": llm, "illava_llm_r": settings["llm_ratio"]}
    return settings | {"vit_layers": vit, "llm_layers": llm, "method": "illava"}


OFF = {"enable_illava_vit": False, "enable_illava_llm": False}
#: What is run, by name: the model's name and its arguments, and which row of `evaluate` it must equal.
RUNS: dict[str, tuple[Callable[[str], str], Callable[[str], dict[str, Any]], str]] = {
    "the harness's own": (lambda family: harness_of(family).stock, lambda family: {}, "none"),
    "merging": ("{}_illava".format, lambda family: merge_arguments(family, False), "illava"),
    "published names": ("{}_illava".format, lambda family: merge_arguments(family, True), "illava"),
    "switched off": ("{}_illava".format, lambda family: {**merge_arguments(family, True), **OFF}, "none"),
}


def as_the_harness_shows_it(family: str, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """For some models the harness writes a JPEG and resizes it to whole blocks, the patches of released models."""
    block = harness_of(family).jpeg_blocks
    if block is None:
        return picture
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    height, width = (max(block, round(size / block) * block) for size in picture.shape[:2])
    return np.asarray(Image.open(buffer).resize((width, height)))


def write_items(folder: Path, items: Sequence[Item], pictures: Sequence[NDArray[np.uint8]]) -> Path:
    folder.mkdir()
    lines = []
    for index, (item, picture) in enumerate(zip(items, pictures, strict=True)):
        path = folder / f"{index}.png"
        Image.fromarray(picture).save(path)
        lines.append({"image": [str(path)], "question": item.question, "answer": item.answer, "kind": item.kind})
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "items.jsonl"


def save_model(family: str, folder: Path) -> None:
    model, processor = tiny.load(family)
    # The harness always sends a system message, which no prompt of `evaluate` has.
    loop = "{% for message in messages"
    template = processor.chat_template.replace(loop, f"{loop} if message['role'] != 'system'")
    assert template != processor.chat_template
    processor.chat_template = template
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def lmms_eval(folder: Path, *arguments: str) -> str:
    """Runs the harness's command in a folder and returns all that it prints."""
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "LMMS_EVAL_HOME": str(folder),
    }
    environment.pop("PYTHONPATH", None)  # the harness brings a transformers of its own
    command = [PYTHON, "-m", "lmms_eval", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900
    )
    return done.stdout


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the questions for the harness and for `evaluate`."""
    folder = tmp_path_factory.mktemp(family)
    items = scene_items(QUESTIONS)
    write_items(folder / "shown", items, [as_the_harness_shows_it(family, item.pictures[0]) for item in items])
    write_items(folder / "items", items, [item.pictures[0] for item in items]).rename(folder / "items.jsonl")
    save_model(family, folder / "model")
    return folder


@pytest.fixture(scope="module")
def rows(family: str, folder: Path) -> dict[str, Row]:
    """What `illava-hooks evaluate` finds."""
    options = {
        "model": folder / "model",
        "items": folder / "shown" / "items.jsonl",
        "questions": QUESTIONS,
        "methods": "illava",
        "kept": KEPT,
        "output": folder / "rows.jsonl",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["evaluate", *words])
    assert done.exit_code == 0, done.output
    return {row.method: row for row in read_rows(folder / "rows.jsonl")}


@pytest.fixture(scope="module")
def printed(family: str, folder: Path) -> str:
    """What the harness prints for all runs; it takes several of them in one configuration file."""
    common = {"pretrained": "model", "device": "cpu", "device_map": "cpu"}
    configurations = [
        {
            "model": model(family),
            "model_args": ",".join(f"{name}={value}" for name, value in {**common, **arguments(family)}.items()),
            "tasks": "illava_scenes",
            "include_path": str(TASK),
            "batch_size": str(harness_of(family).batch_size),
            "force_simple": name == "published names",
            "output_path": f"output/{name}",
            "log_samples": True,
        }
        for name, (model, arguments, _) in RUNS.items()
    ]
    (folder / "runs.yaml").write_text(json.dumps(configurations))  # JSON is YAML
    return lmms_eval(folder, "--config", "runs.yaml")


@pytest.mark.parametrize("run", RUNS)
def test_scores_equal_those_of_evaluate(
    run: str, family: str, folder: Path, rows: dict[str, Row], printed: str
) -> None:
    results = list((folder / "output" / run).rglob("*_results.json"))
    assert len(results) == 1, printed
    score = json.loads(results[0].read_text())["results"]["illava_scenes"]["exact_match,none"]
    (samples,) = (folder / "output" / run).rglob("*_samples_illava_scenes.jsonl")
    found = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()), key=lambda sample: sample["doc_id"]
    )
    row = rows[RUNS[run][2]]
    assert score == pytest.approx(row.accuracy)
    assert [bool(sample["exact_match"]) for sample in found] == row.right


def test_merging_is_told_and_changes_answers(family: str, rows: dict[str, Row], printed: str) -> None:
    assert printed.count("illava_hooks merges with 'illava'") == len(RUNS) - 1
    assert rows["none"].right != rows["illava"].right, "otherwise equal scores would show nothing"
    assert rows["none"].accuracy > 0.6


def test_a_wrong_argument_is_told_in_one_line(family: str, folder: Path) -> None:
    printed = lmms_eval(
        folder,
        *("--model", f"{family}_illava", "--model_args", "pretrained=model,device=cpu,device_map=cpu,vit_layers=3-99"),
        *("--tasks", "illava_scenes", "--include_path", str(TASK), "--batch_size", "1"),
    )
    assert "Error during evaluation: vit_layers contains 99; this model allows 0..7; choose other layers" in printed
