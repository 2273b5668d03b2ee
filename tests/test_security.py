"""Files from strangers: nothing in them is executed, and nothing is written where it was not asked for."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import illava_hooks
from families import families
from helpers import assert_says
from illava_hooks import tiny
from illava_hooks.cli import app
from illava_hooks.errors import InputError
from illava_hooks.tools.datasets import read_items
from illava_hooks.tools.loading import load_model
from illava_hooks.tools.media import load_media

#: A family that has an embedded model.
EMBEDDED = families(embedded=True)[-1]

SOURCE = Path(illava_hooks.__file__).parent
#: Functions that run what they read, and modules whose readers do.
RUNS_WHAT_IT_READS = {"eval", "exec", "compile", "__import__"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.file}'",)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that comes to be when something of this test's files is executed; it is seen that it would."""
    file = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(file)))
    assert file.exists()
    file.unlink()
    return file


#: The one exception: a method's file that the user's own command or program names (`test_own_methods.py` shows that
#: nothing else can name one).
RUNS_A_NAMED_FILE = {"tools/methods.py": ("exec", "compile")}


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_code_that_runs_what_it_reads(file: Path) -> None:
    wanted = RUNS_A_NAMED_FILE.get(file.relative_to(SOURCE).as_posix(), ())
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names}
            names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
            assert not names & UNPICKLERS, ast.unparse(node)
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in wanted:
                continue
            assert called not in RUNS_WHAT_IT_READS and called not in ("torch.load", "np.load", "os.system"), called
            assert "allow_pickle" not in given and given.get("shell") != "True"
            if called.endswith(".from_pretrained") and "tools" in file.parts:  # others load what is embedded
                assert given.get("trust_remote_code") == "False", f"{called} may ask whether to run a stranger's code"


# ------------------------------------------------------------------------------------- models


def checkpoint(folder: Path) -> Path:
    """A copy of an embedded model."""
    shutil.copytree(tiny.folder(EMBEDDED), folder)
    return folder


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def pickled_weights(folder: Path, trap: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil(trap)}, folder / "pytorch_model.bin")


def raw_pickle(folder: Path, trap: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(trap)))


def pickle_named_safetensors(folder: Path, trap: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(trap)))


def pickled_adapter(folder: Path, trap: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"weight": Evil(trap)}, folder / "adapter_model.bin")


def own_code(folder: Path, trap: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.system(\"touch '{trap}'\")\nclass Evil: pass\n")
    classes = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")}
    change(folder / "config.json", model_type="evil", architectures=["Evil"], auto_map=classes)


def own_processor(folder: Path, trap: Path) -> None:
    own_code(folder, trap)
    shutil.copy(tiny.folder(EMBEDDED) / "config.json", folder)
    change(folder / "processor_config.json", processor_class="Evil", auto_map={"AutoProcessor": "evil.Evil"})


MODELS = (pickled_weights, raw_pickle, pickle_named_safetensors, pickled_adapter, own_code, own_processor)


@pytest.mark.parametrize("spoil", MODELS, ids=lambda function: function.__name__)
def test_a_model_from_a_stranger_runs_nothing(tmp_path: Path, trap: Path, spoil: Any) -> None:
    """Also not when somebody answers yes to everything."""
    folder = checkpoint(tmp_path / "model")
    spoil(folder, trap)
    result = CliRunner().invoke(app, ["ask", "--model", str(folder)], input="y\n" * 9)
    assert not trap.exists()
    assert result.exit_code == 2 and result.stderr.startswith("error: model") and result.stderr.count("\n") == 1
    with pytest.raises(InputError) as caught:
        load_model(str(folder))
    assert_says(caught.value, "cannot be loaded", "give one of")
    assert not trap.exists()


def test_a_chat_template_from_a_stranger_runs_nothing(tmp_path: Path, trap: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    escape = f"""{{{{ cycler.__init__.__globals__.os.system("touch '{trap}'") }}}}"""
    (folder / "chat_template.jinja").write_text(escape)
    result = CliRunner().invoke(app, ["ask", "--model", str(folder), "--question", "how many circles are there ?"])
    assert not trap.exists() and result.exit_code == 2
    assert "error: the chat template of the model cannot be used" in result.stderr and result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------- media and questions


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.mp4", "a.npy", "a.pkl", "a.pt"])
def test_a_pickle_given_as_a_picture(tmp_path: Path, trap: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(InputError, match="cannot be read as an image or a video"):
        load_media(tmp_path / name)
    (tmp_path / name).unlink()
    torch.save({"pixels": Evil(trap)}, tmp_path / name)
    with pytest.raises(InputError, match="cannot be read as an image or a video"):
        load_media(tmp_path / name)
    assert not trap.exists()


def test_a_pickle_given_as_questions_or_rows(tmp_path: Path, trap: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_bytes(pickle.dumps(Evil(trap), protocol=0))
    for arguments in (["--items", str(file)], ["--questions", "6", "--output", str(file)]):
        result = CliRunner().invoke(app, ["evaluate", *arguments])
        assert result.exit_code == 2 and "items.jsonl" in result.stderr, result.output
    assert not trap.exists() and file.read_bytes() == pickle.dumps(Evil(trap), protocol=0)


def test_questions_name_files_of_their_author(tmp_path: Path) -> None:
    """Reading what one's own file names, wherever it lies, is what the documentation says."""
    outside, folder = tmp_path / "outside.png", tmp_path / "folder"
    folder.mkdir()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(outside)
    items = folder / "items.jsonl"
    for path in (str(outside), "../outside.png"):
        items.write_text(json.dumps({"image": path, "question": "q", "answer": "a"}))
        assert read_items(items)[0].pictures[0][0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    "line",
    ['{"image": [1]', '{"image": [1], "question": "q", "answer": "a"}', '{"image": 5, "question": "q", "answer": "a"}',
     '{"image": [], "question": "q", "answer": "a"}', '{"video": null, "question": "q", "answer": "a"}', "[]", "5",
     "[" * 100_000, '{"a":' * 100_000],
    ids=lambda line: line[:20],
)  # fmt: skip
def test_lines_that_are_no_questions(tmp_path: Path, line: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(InputError) as caught:
        read_items(file)
    assert_says(caught.value, "^items.jsonl, line 1 is no item", "write image or video, question and answer")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../" * 20 + "etc/passwd", "http://127.0.0.1:9/a.png", "file:///etc/passwd", "a\0b", "\n"]
)
def test_questions_that_name_something_else(tmp_path: Path, path: str) -> None:
    """Neither a host nor the content of a file that is no picture gets into the message."""
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps({"image": path, "question": "q", "answer": "a"}))
    with pytest.raises(InputError) as caught:
        read_items(file)
    assert "root:" not in str(caught.value) and "\n" not in str(caught.value)
