"""`transformers serve` with a patched model, over HTTP, with an image in the request.

The server loads its models itself, through `ModelManager._load_model`: that is the place to patch them.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from families import families
from illava_hooks import MergeSession, patch, tiny

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f"transformers serve needs {package}")

from transformers.cli.serve import Serve  # noqa: E402
from transformers.cli.serving.model_manager import ModelManager  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision"),  # data URLs
]

QUESTION = "how many triangles are there ?"
NEW_TOKENS = 4


class Served:
    """A running server of one embedded model, whose models are patched when they are loaded."""

    def __init__(self, family: str) -> None:
        """Starts on a free port of this machine; the model is loaded at once."""
        self.family, self.folder = family, str(tiny.folder(family))
        self.sessions: list[MergeSession] = []
        self.loops: list[asyncio.AbstractEventLoop] = []
        stock, new_loop = ModelManager._load_model, asyncio.new_event_loop

        def load(manager: Any, *args: Any, **kwargs: Any) -> Any:
            model = stock(manager, *args, **kwargs)
            self.sessions.append(patch(model))
            return model

        def loop() -> asyncio.AbstractEventLoop:
            self.loops.append(new_loop())
            return self.loops[-1]

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(ModelManager, "_load_model", load)
            monkeypatch.setattr(asyncio, "new_event_loop", loop)
            self.server = Serve(
                force_model=self.folder,
                host="127.0.0.1",
                port=self.port,
                device="cpu",
                dtype="float32",
                non_blocking=True,
            )
            end = time.monotonic() + 60
            while not self.server.server.started:
                assert time.monotonic() < end, "the server did not start"
                time.sleep(0.05)

    def stop(self) -> None:
        """Ends the server and closes its event loop, which `kill_server` leaves to the garbage collector."""
        self.server.kill_server()
        self.server._thread.join(timeout=60)
        for loop in self.loops:
            loop.close()

    def ask(self, path: str, body: dict[str, Any]) -> str:
        """The text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        assert response.status == 200, text
        return text


@pytest.fixture(scope="module", params=families(embedded=True))
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """One server for all tests of a family."""
    one = Served(request.param)
    yield one
    one.stop()


def picture() -> str:
    """The bundled scene as a data URL."""
    return "data:image/png;base64," + base64.b64encode(tiny.media("scene.png").read_bytes()).decode()


def chat(served: Served, **settings: Any) -> dict[str, Any]:
    """A request of the chat kind."""
    image = {"type": "image_url", "image_url": {"url": picture()}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
    return {"model": served.folder, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, **settings}


def expected(served: Served) -> tuple[MergeSession, str, int]:
    """What `generate` of a patched model answers here: session, text and length of the prompt."""
    model, processor = tiny.load(served.family)
    session = patch(model)
    content = [{"type": "image", "image": Image.open(tiny.media("scene.png"))}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        tokenize=True,
    )
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return session, processor.decode(ids[0, length:], skip_special_tokens=True), length


def test_a_question_about_an_image(served: Served) -> None:
    (session,) = served.sessions
    twin, text, length = expected(served)
    answer = json.loads(served.ask("/v1/chat/completions", chat(served)))
    assert answer["choices"][0]["message"]["content"].endswith(text) and text
    assert answer["usage"]["prompt_tokens"] == length, "the prompt keeps its length"
    assert session.report == twin.report and session.report.kept_fraction < 0.5


def test_a_streamed_answer(served: Served) -> None:
    _, text, _ = expected(served)
    lines = served.ask("/v1/chat/completions", chat(served, stream=True)).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(parts).endswith(text)
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_the_switch_reaches_requests(served: Served) -> None:
    """`merging` would hold for the thread that opens it only, which is not the server's."""
    (session,) = served.sessions
    served.ask("/v1/chat/completions", chat(served))
    report = session.report
    session.enabled = False
    try:
        served.ask("/v1/chat/completions", chat(served))
        assert session.report is report, "it merged"
    finally:
        session.enabled = True
    served.ask("/v1/chat/completions", chat(served))
    assert session.report == report and session.report is not report


def test_text_alone(served: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    answer = json.loads(served.ask("/v1/chat/completions", {**chat(served), "messages": messages}))
    assert answer["usage"]["completion_tokens"] > 0
