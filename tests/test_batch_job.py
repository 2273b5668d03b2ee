"""`illava-hooks batch`: killed anywhere and started again, it answers every row once, as one process would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from illava_hooks import InputError, tiny
from illava_hooks.cli import app
from illava_hooks.integrations.batch import BatchAnswers
from illava_hooks.integrations.batch_job import RESULT, BatchJob

SCENE = str(tiny.media("scene.png"))
ASKED = ("how many circles are there ?", "what color is the star ?", "is there a square ?")
OPTIONS = ["--model", "tiny", "--batch-size", "2", "--max-new-tokens", "4"]


def write_questions(folder: Path, count: int = 6) -> Path:
    """Rows of which one has a picture that is not there."""
    file = folder / "questions.jsonl"
    rows = [{"id": f"q{index}", "question": ASKED[index % 3], "image": SCENE} for index in range(count)]
    rows[1]["image"] = "dead.png"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def job(questions: Path, output: Path, **changes: Any) -> BatchJob:
    answers = BatchAnswers("tiny", batch_size=2, max_new_tokens=4, method="illava", preset="auto", **NUMBERS)
    return BatchJob(questions, output, answers, **changes)


#: What the command hands on where no number is given.
NUMBERS = {"vit_layers": None, "vit_r": None, "llm_layers": None, "llm_ratio": None}


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def start(questions: Path, output: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "illava_hooks", "batch", "--input", str(questions), "--output", str(output)]
    with (output.parent / "log").open("ab") as log:
        return subprocess.Popen([*command, *OPTIONS, "--workers", str(workers)], stdout=log, stderr=log)


def wait_for_parts(output: Path, count: int, process: subprocess.Popen[bytes]) -> list[int]:
    """The processes that have answered something, once there are so many."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        parts = [part for part in output.glob("part-*") if part.stat().st_size]
        if len(parts) >= count:
            return [int(part.stem.split("-")[-1]) for part in parts]
        time.sleep(0.02)
    raise AssertionError(f"no answers in time\n{(output.parent / 'log').read_text()[-2000:]}")


def test_answers_are_those_of_the_class(tmp_path: Path) -> None:
    questions = write_questions(tmp_path)
    seen: list[tuple[int, int]] = []
    result = job(questions, tmp_path / "out").run(lambda done, of: seen.append((done, of)))
    found, asked = rows_of(result), rows_of(questions)
    assert [row["row"] for row in found] == list(range(6)) and [row["id"] for row in found] == [q["id"] for q in asked]
    expected = BatchAnswers("tiny", max_new_tokens=4, folder=tmp_path)(
        {name: [row[name] for row in asked] for name in ("question", "image")}
    )
    for name in ("answer", "visual_tokens", "kept_tokens", "error"):
        assert [row[name] for row in found] == expected[name]
    assert "does not exist" in found[1]["error"]
    assert seen[0] == (0, 6) and seen[-1] == (6, 6) and seen == sorted(seen)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [RESULT, "job.json"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a worker", "the command"])
def test_killed_and_started_again(victim: str, tmp_path: Path) -> None:
    questions, output = write_questions(tmp_path, 40), tmp_path / "out"
    output.mkdir()
    process = start(questions, output, workers=2)
    pids = wait_for_parts(output, 2, process)
    os.kill(pids[0] if victim == "a worker" else process.pid, signal.SIGKILL)
    if victim != "a worker":
        process.wait()
        assert not (output / RESULT).exists(), "it was over before it was killed"
        # What a process leaves that dies while it writes.
        with max(output.glob("part-*")).open("a") as part:
            part.write('{"row": 3, "ans')
        process = start(questions, output, workers=1)  # how many there are is no part of the job
    # One picture is missing, which is told by the exit code too.
    assert process.wait(400) == 1, (tmp_path / "log").read_text()[-2000:]
    found = rows_of(output / RESULT)
    alone = rows_of(job(questions, tmp_path / "alone").run())
    assert found == alone and len(found) == 40


@pytest.mark.parametrize("workers", [1, 2])
def test_old_errors_do_not_stand_for_rows_that_were_not_asked_again(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks again and is killed on the way still has those rows to ask, with `retry_errors` or without."""
    questions, output = write_questions(tmp_path), tmp_path / "out"
    answered = [row for row in rows_of(job(questions, output).run()) if row["error"] is None]
    (tmp_path / "dead.png").write_bytes(Path(SCENE).read_bytes())
    with monkeypatch.context() as patched:
        for work in ("_work", "_share"):  # processes that die before they answer
            patched.setattr(BatchJob, work, lambda *_: None)
        with pytest.raises(InputError, match="row 1, the first of 1 that are left"):
            job(questions, output, retry_errors=True, workers=workers).run()
    parts = list(output.glob("part-*"))
    assert not (output / RESULT).exists() and [row for part in parts for row in rows_of(part)] == answered
    assert all(row["error"] is None for row in rows_of(job(questions, output).run()))


def test_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered rows are not asked again; errors are, if wanted."""
    questions, output = write_questions(tmp_path), tmp_path / "out"
    asked: list[int] = []
    ask = BatchAnswers.__call__
    monkeypatch.setattr(
        BatchAnswers, "__call__", lambda self, batch: asked.append(len(batch["image"])) or ask(self, batch)
    )
    first = rows_of(job(questions, output).run())
    assert asked == [2, 2, 2]
    assert rows_of(job(questions, output).run()) == first and asked == [2, 2, 2]
    (tmp_path / "dead.png").write_bytes(Path(SCENE).read_bytes())
    again = rows_of(job(questions, output, retry_errors=True).run())
    assert asked == [2, 2, 2, 1] and again[1]["error"] is None and again[1]["answer"]
    assert again[:1] + again[2:] == first[:1] + first[2:]
    # Rows of a part are kept too, whatever else its process wrote.
    lines = (output / RESULT).read_text().splitlines(keepends=True)
    (output / RESULT).unlink()
    (output / "part-1-1.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert rows_of(job(questions, output).run()) == again and asked == [2, 2, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens is 4 there and 5 now"),
        ({"model": list(tiny.ALIASES)[1]}, "model is"),
        ({"vit_r": 8}, "settings is"),
        ({"frames": 3}, "frames is 32"),
        ({"questions": True}, "questions is"),
    ],
)
def test_another_job_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    questions, output = write_questions(tmp_path, 2), tmp_path / "out"
    first = job(questions, output).run().read_text()
    if "questions" in change:
        write_questions(tmp_path, 3)
        other = job(questions, output)
    else:
        given = {"model": "tiny", "batch_size": 2, "max_new_tokens": 4, "method": "illava", "preset": "auto"}
        other = BatchJob(questions, output, BatchAnswers(**{**given, **NUMBERS, **change}))
    with pytest.raises(InputError, match=words):
        other.run()
    assert (output / RESULT).read_text() == first


OWN = "from illava_hooks import Method\nmine = Method('mine', encoder_score='uniform', merge='{}')\n"


@pytest.mark.parametrize("kind", ["method", "method with state", "preset"])
def test_a_file_that_was_edited_is_another_job(kind: str, tmp_path: Path) -> None:
    questions, output = write_questions(tmp_path, 2), tmp_path / "out"
    if kind == "preset":
        file = tmp_path / "settings.json"
        image = {"vit_layers": [3], "llm_layers": [2], "llm_ratio": 0.7}
        both = [{name: {**image, "vit_r": share} for name in ("image", "video")} for share in (0.1, 0.2)]
        texts = [json.dumps({"illava_hooks": 1, "method": "illava", "track": False, **one}) for one in both]
        settings: dict[str, Any] = {"preset": str(file)}
    else:
        file = tmp_path / "own.py"
        texts = [OWN.format("drop"), OWN.format("nearest")]
        settings = {"method": f"{file}:mine"}
    if kind == "method with state":
        state = "s = iter([0] * 99)\ndef score(inputs):\n    return inputs.positions * next(s)\n"
        texts = 2 * [state + texts[0].replace("'uniform'", "score")]
    file.write_text(texts[0])

    def answered() -> Path:
        return BatchJob(questions, output, BatchAnswers("tiny", max_new_tokens=4, **settings)).run()

    first = answered().read_text()
    if kind != "method with state":
        assert answered().read_text() == first
    file.write_text(texts[1])
    with pytest.raises(InputError, match="another job: contents is"):
        answered()
    assert (output / RESULT).read_text() == first


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny.folder(tiny.NAMES[0]), model)
    questions, output = write_questions(tmp_path, 2), tmp_path / "out"
    BatchJob(questions, output, BatchAnswers(str(model), max_new_tokens=4)).run()
    shutil.copytree(tiny.folder(tiny.NAMES[1]), model, dirs_exist_ok=True)
    with pytest.raises(InputError, match="another job: model is"):
        BatchJob(questions, output, BatchAnswers(str(model), max_new_tokens=4)).run()


@pytest.mark.parametrize("line", ["{", "3", "[]", '"text"', '{"image": "a.png"}', '{"question": ["a"]}', "{}"])
def test_a_line_that_is_no_row_is_a_row_with_an_error(line: str, tmp_path: Path) -> None:
    questions = write_questions(tmp_path, 2)
    text = questions.read_text()
    questions.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n" + line.encode() + b"\n\n" + text.encode())
    found = rows_of(job(questions, tmp_path / "out").run())
    assert len(found) == 5 and found[2]["answer"] is None and "question" in found[2]["error"]
    assert found[0]["answer"] == found[3]["answer"] != None  # noqa: E711


def test_a_line_separator_in_a_string_ends_no_line(tmp_path: Path) -> None:
    questions = write_questions(tmp_path, 2)
    row = {"question": "is there a square ?", "image": SCENE, "note": "a\u2028b"}
    questions.write_text(questions.read_text() + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    result = job(questions, tmp_path / "out").run()
    last = json.loads(result.read_text(encoding="utf-8").split("\n")[2])
    assert last["note"] == "a\u2028b" and last["error"] is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ('{"question": "a", "answer": "b"}\n', "has 'answer'"),
        ('{"question": "a", "row": 3}\n', "has 'row'"),
        (None, "cannot be read"),
    ],
)
def test_input_that_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    if text is not None:
        file.write_text(text)
    found = CliRunner().invoke(app, ["batch", "--input", str(file), "--output", str(tmp_path / "out"), *OPTIONS])
    assert found.exit_code == 2 and words in found.output


def test_output_that_is_refused(tmp_path: Path) -> None:
    questions, output = write_questions(tmp_path, 2), tmp_path / "out"
    output.write_text("a file")
    with pytest.raises(InputError, match="give a new folder"):
        job(questions, output).run()
    output.unlink()
    job(questions, output).run()
    (output / "part-1-1.jsonl").write_text("no JSON\n")
    with pytest.raises(InputError, match="damaged"):
        job(questions, output).run()


def test_the_command_says_how_many_rows_failed(tmp_path: Path) -> None:
    questions = write_questions(tmp_path, 3)
    found = CliRunner().invoke(app, ["batch", "--input", str(questions), "--output", str(tmp_path / "out"), *OPTIONS])
    assert found.exit_code == 1, found.output
    assert str(tmp_path / "out" / RESULT) in found.stdout.replace("\n", "")
    assert "1 rows ended with an error, the first:" in found.stderr and "--retry-errors" in found.stderr
    questions.write_text('{"question": "what is there ?"}\n')
    found = CliRunner().invoke(app, ["batch", "--input", str(questions), "--output", str(tmp_path / "all"), *OPTIONS])
    assert found.exit_code == 0 and "error" not in found.stderr


def test_the_lines_of_the_docs_are_rows(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    block = page.partition("```json\n")[2].partition("```")[0]
    (tmp_path / "questions.jsonl").write_text(block)
    for number, folder in enumerate(("photos", "clips")):
        (tmp_path / folder).mkdir()
        for name in ("1.jpg", "2.jpg", "7.mp4"):
            source = tiny.media("clip.gif") if number else Path(SCENE)
            (tmp_path / folder / name).write_bytes(source.read_bytes())
    found = rows_of(job(tmp_path / "questions.jsonl", tmp_path / "out").run())
    assert [row["error"] for row in found] == [None] * 3 and [row["id"] for row in found] == ["a1", "a2", "a3"]
    assert all(row["kept_tokens"] < row["visual_tokens"] for row in found)


@pytest.mark.slow
@pytest.mark.nightly
def test_torchrun_goes_on_after_a_process_died(tmp_path: Path) -> None:
    """The launcher starts all processes again; they answer what is left."""
    questions, output = write_questions(tmp_path, 40), tmp_path / "out"
    script = Path(__file__).parents[1] / "examples" / "torchrun_batch.py"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", str(script)]
    options = ["--input", str(questions), "--output", str(output), "--batch-size", "2", "--max-new-tokens", "4"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", *command, *options], stdout=log, stderr=log)
    end = time.monotonic() + 300
    parts: list[Path] = []
    while len(parts) < 2 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
        parts = [part for part in output.glob("*.jsonl") if part.stat().st_size]
    assert len(parts) == 2, (tmp_path / "log").read_text()[-2000:]
    os.kill(int(parts[0].stem.split("-")[-1]), signal.SIGKILL)
    assert process.wait(400) == 0, (tmp_path / "log").read_text()[-2000:]
    assert {int(part.stem.split("-")[1]) for part in output.glob("*.jsonl")} == {0, 1}, "nothing was started again"
    found: dict[int, dict[str, Any]] = {}
    for part in output.glob("*.jsonl"):
        for line in part.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            assert found.setdefault(row["row"], row) == row
    alone = rows_of(job(questions, tmp_path / "alone").run())
    assert [found[index] for index in range(40)] == alone
