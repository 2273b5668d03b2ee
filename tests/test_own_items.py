"""Files of questions: what is written is read, and what cannot be meant is told in one line with its number."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import assert_says
from illava_hooks import tiny
from illava_hooks.errors import InputError
from illava_hooks.tiny.questions import QUESTION_KINDS
from illava_hooks.tools.datasets import SUITES, load_items, read_items
from illava_hooks.tools.items import make_item

QUESTION = {"question": "what is it ?", "answer": "white"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures: two stills, an animation, a folder of stills."""
    for name, shade in (("a.png", 10), ("b.png", 20)):
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(tmp_path / name)
    frames = [Image.new("RGB", (8, 8), (40 * index, 0, 0)) for index in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "stills").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "stills" / "c.png")
    return tmp_path


def write(folder: Path, *rows: Any, encoding: str = "utf-8", end: str = "\n") -> Path:
    file = folder / "mine.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(end.join(lines).encode(encoding))
    return file


class TestForms:
    """What programs write that is JSON lines all the same."""

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n  \n\t\n"])
    def test_encodings_and_empty_lines(self, folder: Path, encoding: str, end: str) -> None:
        rows = [{"image": "a.png", "question": "was ist weiß ?"}, {"image": "b.png", "question": "白 ?"}, ""]
        items = read_items(write(folder, *rows, encoding=encoding, end=end))
        assert [item.question for item in items] == ["was ist weiß ?", "白 ?"]

    @pytest.mark.parametrize("raw", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b"])
    def test_line_ends_of_others_inside_of_a_string(self, folder: Path, raw: str) -> None:
        """JSON strings may hold them (all but control characters), and `str.splitlines` cuts there."""
        written = raw if ord(raw) > 0x1F else json.dumps(raw)[1:-1]
        line = f'{{"image": "a.png", "question": "one{written}two", "answer": "x{written}y"}}'
        (item,) = read_items(write(folder, line, ""))
        assert item.question == f"one{raw}two" and item.answer == f"x{raw}y"

    def test_numbers_of_lines_count_empty_ones(self, folder: Path) -> None:
        file = write(folder, {"image": "a.png", **QUESTION}, "", "", {"image": "a.png"})
        with pytest.raises(InputError) as caught:
            read_items(file)
        assert_says(caught.value, "mine.jsonl, line 4 is no item", "question is None")

    @pytest.mark.parametrize("content", ["", "\n", "\n \r\n\n", "\ufeff"])
    def test_nothing_in_it(self, folder: Path, content: str) -> None:
        with pytest.raises(InputError, match="is empty; write one JSON object a line"):
            read_items(write(folder, content))


class TestFields:
    def test_answers(self, folder: Path) -> None:
        given = [None, "two", ["2", "two"], 2, [2, "two"], 2.5]
        items = read_items(write(folder, *({"image": "a.png", "question": "q", "answer": one} for one in given)))
        assert [item.accepted for item in items] == [
            (), ("two",), ("2", "two"), ("2",), ("2", "two"), ("2.5",),
        ]  # fmt: skip
        (without,) = read_items(write(folder, {"image": "a.png", "question": "q"}))
        assert without.answer is None and without.accepted == ()

    @pytest.mark.parametrize(
        ("given", "accepted"),
        [
            (math.nan, ()),
            (np.float64("nan"), ()),
            ([math.nan], ()),
            ([math.nan, -math.nan], ()),
            ([math.nan, "two"], ("two",)),
            (["2", math.nan, "two"], ("2", "two")),
            ([2, "two", np.float64("nan")], ("2", "two")),
            ("nan", ("nan",)),
            (["NaN", math.nan], ("NaN",)),
        ],
    )
    def test_nan_is_no_answer(self, folder: Path, given: Any, accepted: tuple[str, ...]) -> None:
        """What pandas writes for a label that is missing, in a file and from a program; the text is one."""
        row = {"image": "a.png", "question": "q", "answer": given}
        (read,) = read_items(write(folder, row))
        for item in (read, make_item(row, "item 0", folder)):
            assert item.accepted == accepted and item.answer == next(iter(accepted), None)

    def test_pictures(self, folder: Path) -> None:
        rows: list[Any] = [
            {"image": "a.png"},
            {"image": ["a.png", "b.png"]},
            {"image": "stills"},
            {"image": ["a.png", "stills"]},
        ]
        rows += [{"video": "moving.gif"}, {"video": ["moving.gif"]}, {"image": None, "video": "moving.gif"}]
        items = read_items(write(folder, *({**row, **QUESTION} for row in rows)))
        assert [(item.video, len(item.pictures)) for item in items] == [
            (False, 1), (False, 2), (False, 1), (False, 2), (True, 1), (True, 1), (True, 1),
        ]  # fmt: skip
        assert items[1].pictures[1][0, 0].tolist() == [20, 20, 20] and items[4].pictures[0].shape == (3, 8, 8, 3)

    @pytest.mark.parametrize(
        ("row", "parts"),
        [
            ({"video": ["moving.gif", "moving.gif"]}, ["video is a list of 2", "give one path"]),
            ({"image": "a.png", "video": "moving.gif"}, ["has image and video"]),
            ({}, ["neither image nor video"]),
            ({"image": [], "video": "moving.gif"}, ["has image and video"]),
            ({"image": []}, [r"image is \[\]"]),
            ({"image": ""}, ["image is ''"]),
            ({"image": ["a.png", 5]}, [r"image is \['a.png', 5\]"]),
            ({"image": "moving.gif"}, ["image is 'moving.gif', which is a video", 'write it as "video"']),
            ({"image": ["a.png", "moving.gif"]}, ["image is 'moving.gif', which is a video"]),
            ({"video": "a.png"}, ["video is 'a.png', which is no video", 'write it as "image"']),
            ({"video": "stills"}, ["video is 'stills', which is no video"]),
            ({"image": "nowhere.png"}, ["mine.jsonl, line 1: .*nowhere.png'.*does not exist"]),
            ({"image": "a.png", "answer": []}, [r"answer is \[\]", "leave it out"]),
            ({"image": "a.png", "answer": ""}, ["answer is ''"]),
            ({"image": "a.png", "answer": True}, ["answer is True"]),
            ({"image": "a.png", "answer": ["2", None]}, [r"answer is \['2', None\]"]),
            ({"image": "a.png", "answer": {"text": "2"}}, ["answer is {"]),
            ({"image": "a.png", "question": ["q"]}, [r"question is \['q'\]"]),
            ({"image": "a.png", "question": " "}, ["question is ' '"]),
        ],
    )
    def test_what_cannot_be_meant_is_told_with_its_line(self, folder: Path, row: Any, parts: list[str]) -> None:
        with pytest.raises(InputError) as caught:
            read_items(write(folder, {**QUESTION, **row}))
        assert_says(caught.value, "^mine.jsonl, line 1", *parts)

    def test_items_of_a_program(self) -> None:
        picture = np.full((6, 8, 3), 7, np.uint8)
        for source in (picture, Image.fromarray(picture), [picture], str(tiny.media("scene.png"))):
            item = make_item({"image": source, "question": "q"}, "item 0")
            assert not item.video and item.pictures[0].ndim == 3 and item.accepted == ()
        film = np.zeros((4, 6, 8, 3), np.uint8)
        assert make_item({"video": film, "question": "q"}, "item 0").pictures[0].shape == film.shape
        for wrong, told in (
            ({"image": film, "question": "q"}, r"array of uint8 \(4, 6, 8, 3\)"),
            ({"video": picture, "question": "q"}, r"array of uint8 \(6, 8, 3\)"),
            ({"image": picture / 255, "question": "q"}, "array of float64"),
            ("a.png", "it is 'a.png'"),
        ):
            with pytest.raises(InputError, match=told):
                make_item(wrong, "item 0")


class TestCounts:
    @pytest.mark.parametrize("suite", [name for name in SUITES if name != "easy-vqa"])
    @pytest.mark.parametrize("count", [1, 3, 5, 8, 21])
    def test_as_many_questions_as_asked_for(self, suite: str, count: int) -> None:
        items = load_items(suite, count)
        assert len(items) == count and all(item.accepted for item in items)
        kinds = Counter(item.kind for item in items)
        if suite.endswith("scenes"):
            assert max(kinds.values()) - min(kinds.values()) <= 1 and len(kinds) == min(count, len(QUESTION_KINDS))

    def test_more_questions_begin_with_the_same(self) -> None:
        """Where every kind has as many, a shorter run is the beginning of none, but draws the same scenes."""
        few, many = load_items("scenes", 10), load_items("scenes", 12)
        assert {item.question for item in few} <= {item.question for item in many}

    def test_easy_vqa(self) -> None:
        pytest.importorskip("easy_vqa", reason="pip install easy-vqa")
        assert len(load_items("easy-vqa", 7)) == 7

    def test_a_folder_is_told_what_takes_one(self, folder: Path) -> None:
        for given in (folder, str(folder)):
            with pytest.raises(InputError, match="is a folder; give a file with JSON lines .tune takes a folder"):
                load_items(str(given))

    def test_all_of_a_file_unless_told(self, folder: Path) -> None:
        file = write(folder, *[{"image": "a.png", **QUESTION}] * 4)
        assert len(load_items(str(file))) == 4 == len(load_items(str(file), 9)) and len(load_items(str(file), 3)) == 3
        for count in (0, -1):
            with pytest.raises(InputError, match=f"questions is {count}; give 1 or more"):
                load_items(str(file), count)
