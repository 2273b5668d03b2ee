"""`BatchAnswers` as an actor of Ray Data: nothing is lost when one is killed, and it says what one process does."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from illava_hooks import tiny
from illava_hooks.integrations.batch import BatchAnswers
from illava_hooks.tools.datasets import scene_items

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own

ROWS = 200
OPTIONS: dict[str, Any] = {"batch_size": 8, "max_new_tokens": 4, "llm_ratio": 0.6}


class Noted(BatchAnswers):
    """Leaves the number of its process in a folder, and goes on when another one has: then one of them is killed."""

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        found = super().__call__(batch)
        notes = Path(os.environ["NOTES"])
        (notes / str(os.getpid())).touch()
        end = time.monotonic() + 300
        while len(list(notes.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
        return {**found, "process": [os.getpid()] * len(found["question"])}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("notes")
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {"NOTES": str(folder), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=3, include_dashboard=False, object_store_memory=200 * 2**20, runtime_env={"env_vars": environment}
    )
    yield folder
    ray.shutdown()


def rows() -> list[dict[str, Any]]:
    """Scenes and questions, one of them with a picture that is not there."""
    items = scene_items(ROWS)
    found = [{"id": index, "question": item.question, "image": item.pictures[0]} for index, item in enumerate(items)]
    for index, row in enumerate(found):
        if index % 50 == 7:
            row["image"] = str(tiny.media("scene.png")) + ".gone"
        else:
            row["image"] = _png(row["image"])
    return found


def _png(pixels: Any) -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def alone(asked: list[dict[str, Any]]) -> dict[int, tuple[Any, ...]]:
    found = BatchAnswers("tiny", **OPTIONS)({name: [row[name] for row in asked] for name in asked[0]})
    return _by_id([dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)])


def _by_id(found: list[dict[str, Any]]) -> dict[int, tuple[Any, ...]]:
    assert len({row["id"] for row in found}) == len(found)
    return {int(row["id"]): (row["answer"], row["visual_tokens"], row["kept_tokens"], row["error"]) for row in found}


def test_an_actor_is_killed(notes: Path) -> None:
    asked = rows()
    # Columns hold one type: paths travel as bytes of nothing.
    table = ray.data.from_items(
        [
            {**row, "image": {"bytes": row["image"]} if isinstance(row["image"], bytes) else {"path": row["image"]}}
            for row in asked
        ],
        override_num_blocks=25,
    )
    killed: list[int] = []

    def kill_one() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if len(at_work := sorted(notes.iterdir())) >= 2:
                os.kill(int(at_work[0].name), signal.SIGKILL)
                killed.append(int(at_work[0].name))
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    answers = table.map_batches(
        Noted,
        fn_constructor_args=("tiny",),
        fn_constructor_kwargs=OPTIONS,
        batch_size=8,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    found = answers.take_all()
    killer.join()
    assert killed and len(found) == ROWS
    assert len({row["process"] for row in found} | set(killed)) == 3, "no actor was started anew"
    expected = alone([{**row, "image": row["image"]} for row in asked])
    assert _by_id(found) == expected
    assert sum(values[3] is not None for values in expected.values()) == ROWS // 50


def test_the_example(notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet in, parquet out."""
    import pyarrow.parquet

    import ray_batch

    scene = str(tiny.media("scene.png"))
    asked = [{"id": index, "question": "how many circles are there ?", "image": scene} for index in range(6)]
    asked[2]["image"] = "gone.png"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    given = ["--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--actors", "1"]
    monkeypatch.setattr(sys, "argv", ["ray_batch.py", *given, "--max-new-tokens", "4"])
    ray_batch.main()
    found = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    expected = BatchAnswers("tiny", max_new_tokens=4)({name: [row[name] for row in asked] for name in asked[0]})
    assert sorted(row["id"] for row in found) == list(range(6))
    for row in found:
        assert row["answer"] == expected["answer"][row["id"]] and row["error"] == expected["error"][row["id"]]
    assert "gone.png" in next(row["error"] for row in found if row["id"] == 2)
