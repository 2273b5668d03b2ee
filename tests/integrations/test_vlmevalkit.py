"""VLMEvalKit itself, from a TSV file to a score: what it says of a model is what ``illava-hooks evaluate`` says.

It needs the kit in an environment of its own (``make test-integrations``), whose Python is named by
``ILLAVA_VLMEVAL_PYTHON``.
"""

import base64
import csv
import io
import json
import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import illava_hooks
from families import VlmEvalKit, families, family_of
from illava_hooks import patch, tiny
from illava_hooks.cli import app
from illava_hooks.config import PRESETS
from illava_hooks.tools.datasets import Item, scene_items
from illava_hooks.tools.evaluate import budget_settings, predict, read_rows
from illava_hooks.tools.loading import load_model

KIT = os.environ.get("ILLAVA_VLMEVAL_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KIT, reason="needs VLMEvalKit: make test-integrations, or name the Python that has it in "
                       "ILLAVA_VLMEVAL_PYTHON"),
]  # fmt: skip

#: The kit compares answers as they are where a data set is called so.
DATA = "Scenes_GQA"
QUESTIONS, KEPT = 25, 0.0625
ADDED = 6  #: questions to the model that is added on the command line; its pictures can be large


FAMILIES = families(embedded=True, vlmevalkit=True)


@dataclass(frozen=True)
class Run:
    """What the kit said: by model, answers, and the share of right ones by its own measure, in percent."""

    family: str
    kit: VlmEvalKit
    items: list[Item]
    settings: dict[str, Any]
    answers: dict[str, list[str]]
    scores: dict[str, float]

    @property
    def embedded(self) -> str:
        """What the command line calls the model."""
        return str(family_of(self.family).embedded)

    @property
    def entries(self) -> tuple[str, str]:
        """The kit's entries whose models merge."""
        small, large = self.kit.entries
        return f"{small}-iLLaVA", f"{large}-iLLaVA"


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The kit with an embedded model: as it is, merged by the preset, merged more, and added on the command line."""
    family, kit = request.param, family_of(request.param).vlmevalkit
    work = tmp_path_factory.mktemp(family)
    entries = [f"{name}-iLLaVA" for name in kit.entries]
    items = scene_items(QUESTIONS)
    if kit.blocks:
        # The kit's reader rounds sides to multiples of these, the embedded model's processor to multiples of 12.
        assert math.lcm(kit.blocks, 12) == 84
        items = [resized(item, [84 * round(side / 84 + 0.2) for side in item.pictures[0].shape[:2]]) for item in items]
    write_tsv(items, work / f"{DATA}.tsv")
    folder = str(tiny.folder(family))
    schedule = PRESETS[f"{family}/tiny"]["image"]
    settings = budget_settings(schedule, "both", KEPT)
    models = {
        "plain": {"class": kit.model_class, "model_path": folder, **kit.plain},
        entries[0]: {"model_path": folder, **kit.plain},
        entries[1]: {"model_path": folder, **kit.plain, **settings},
    }
    lines = []
    for mode, kind in (("infer", "CustomVQADataset"), ("eval", "ImageVQADataset")):
        config = work / f"{mode}.json"
        config.write_text(json.dumps({"model": models, "data": {DATA: {"class": kind, "dataset": DATA}}}))
        lines.append(["--config", str(config), "--mode", mode])
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    options = [option.replace("[", "").replace("]", "") for option in options]
    lines.append(["--data", DATA, "--model", "added", "--add", f"added={folder}", "--mode", "infer", *options])
    lines[-1] += ["--limit", str(ADDED)]
    start_kit([[*line, "--work-dir", str(work / "outputs")] for line in lines], work)
    answers, scores = {}, {}
    for name in (*models, "added"):
        with (work / "outputs" / name / f"{name}_{DATA}.tsv").open() as file:
            answers[name] = [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
        for file_name in (work / "outputs" / name).glob("*_acc.csv"):
            with file_name.open() as file:
                scores[name] = float(next(csv.DictReader(file))["Overall"])
    return Run(family, kit, items, settings, answers, scores)


def resized(item: Item, size: Sequence[int]) -> Item:
    """The item with its picture at a size of (height, width)."""
    picture = Image.fromarray(item.pictures[0]).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return Item(item.kind, (np.array(picture),), False, item.question, item.answer)


def write_tsv(items: Sequence[Item], path: Path) -> None:
    """Items as the kit reads them."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["index", "image", "question", "answer"])
        for index, item in enumerate(items):
            rows.writerow([index, base64.b64encode(png(item)).decode(), item.question, item.answer])


def png(item: Item) -> bytes:
    """The picture of an item."""
    with io.BytesIO() as file:
        Image.fromarray(item.pictures[0]).save(file, "PNG")
        return file.getvalue()


def start_kit(lines: list[list[str]], work: Path) -> None:
    """Runs command lines of the kit, without network and without a GPU, of which it is told that there is one."""
    tool = work / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'memory.free [MiB]'\necho '8000 MiB'\n")
    tool.chmod(0o755)
    source = str(Path(illava_hooks.__file__).parents[1])
    environment = {
        **os.environ,
        "PATH": f"{tool.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "LMUData": str(work),
        "PRED_FORMAT": "tsv",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(KIT), str(Path(__file__).with_name("kit_without_gpu.py")), json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=work, timeout=900)
    (work / "log.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0 and "skipping this combination" not in done.stderr, done.stderr[-5000:]


def evaluate(run: Run, folder: Path) -> dict[str, list[bool]]:
    """Which questions ``illava-hooks evaluate`` finds answered, by method."""
    lines = []
    for index, item in enumerate(run.items):
        (folder / f"{index}.png").write_bytes(png(item))
        lines.append(json.dumps({"image": f"{index}.png", "question": item.question, "answer": item.answer}))
    (folder / "items.jsonl").write_text("\n".join(lines))
    items = str(folder / "items.jsonl") if run.kit.blocks else "scenes"
    options = {"model": run.embedded, "items": items, "questions": QUESTIONS, "methods": "illava"}
    options |= {"kept": KEPT, "output": folder / "rows", "batch-size": 1, "dtype": "float16", "device": "cpu"}
    done = CliRunner().invoke(app, ["evaluate", *[f"--{name}={value}" for name, value in options.items()]])
    assert done.exit_code == 0, done.output
    return {row.method: row.right for row in read_rows(folder / "rows")}


def test_scores_are_those_of_evaluate(run: Run, tmp_path: Path) -> None:
    found = evaluate(run, tmp_path)
    for name, method in (("plain", "none"), (run.entries[1], "illava")):
        right = [said == item.answer for said, item in zip(run.answers[name], run.items, strict=True)]
        assert right == found[method], name
        assert run.scores[name] == pytest.approx(100 * sum(right) / QUESTIONS)
    assert 0.5 < sum(found["none"]) / QUESTIONS and found["none"] != found["illava"]
    assert run.answers[run.entries[0]] != run.answers[run.entries[1]]  # the settings do matter


def test_presets_merge(run: Run) -> None:
    model, processor = load_model(run.embedded, "cpu", "float16")
    patch(model)
    answers = run.answers[run.entries[0]]
    assert answers == predict(model, processor, run.items, 1) and answers != run.answers["plain"]


def test_a_model_added_on_the_command_line_keeps_the_arguments_of_the_kit(run: Run) -> None:
    model, processor = load_model(run.embedded, "cpu", "float16")
    patch(model, **run.settings)
    items = run.items[:ADDED]
    if (least := run.kit.least) and (block := run.kit.blocks):
        for index, item in enumerate(items):
            height, width = item.pictures[0].shape[:2]
            factor = math.sqrt(least * block * block / (height * width))
            items[index] = resized(item, [math.ceil(side * factor / block) * block for side in (height, width)])
        assert run.answers["added"] != run.answers[run.entries[1]][:ADDED]
    assert run.answers["added"] == predict(model, processor, items, 1)
