"""vLLM in several processes: two ranks, in both modes of the encoder, and the OpenAI server."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asking import Reference, ask_engine, largest_difference, request_of
from engines import FORM, counted, running
from PIL import Image

from illava_hooks.integrations.vllm import overrides
from illava_hooks.tools.datasets import clip_items, pair_items, scene_items
from illava_hooks.tools.items import Item

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # vLLM's own

NAME = "qwen2_vl"
SETTINGS: dict[str, Any] = {"vit_layers": [3, 4], "vit_r": 0.29}
CLOSE = 1e-4


@pytest.fixture(scope="module")
def ours(reference: Callable[[str], Reference]) -> Reference:
    return reference(NAME)


@pytest.mark.parametrize("method", ["illava", "nearest"], ids=["by scores", "by keys"])
@pytest.mark.parametrize("mode", ["weights", "data"])
def test_two_ranks(
    folder: Callable[[str], Path], ours: Reference, mode: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with half of the heads, or with half of the items."""
    if FORM != "all" and (mode, method) != ("data", "illava"):
        pytest.skip("each starts two more processes: one of them in a sample")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else there must be a core for each
    items = scene_items(counted(100)) + pair_items(counted(40)) + clip_items(counted(40))
    options = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": mode}
    with running(folder(NAME), hf_overrides=overrides(**SETTINGS, method=method), **options) as engine:
        asked = [request_of(ours.processor, item) for item in items]
        # Of a picture that is alone one rank has nothing to encode.
        found = ask_engine(engine, asked[:1]) + ask_engine(engine, asked[1:])
    assert largest_difference(found, ours.ask(items, {**SETTINGS, "method": method})) < CLOSE


class Server:
    """vLLM's OpenAI server in a process of its own."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = json.dumps({"illava": SETTINGS})
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--port", str(self.port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024"]
        command += [
            "--enforce-eager",
            "--trust-request-mm-kwargs",
            "--served-model-name",
            "tiny",
            "--hf-overrides",
            settings,
        ]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.log = log.open("w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"no server, see {self.log.name}")

    def get(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: bytes = answer.read()
            return found

    def ask(self, item: Item, **more: Any) -> tuple[str, int]:
        """The answer, and the tokens of the prompt by vLLM's own count."""
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url(p)}} for p in item.pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": item.question}]}
        body = {"model": "tiny", "messages": [message], "temperature": 0, "max_tokens": 6, **more}
        found = json.loads(self.get("/v1/chat/completions", body))
        return found["choices"][0]["message"]["content"].strip(), found["usage"]["prompt_tokens"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def url(picture: Any) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


@pytest.fixture(scope="module")
def server(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(folder(NAME), tmp_path_factory.mktemp("server") / "log")
    try:
        made.wait(900)
        yield made
    finally:
        made.stop()


def test_four_requests_at_once(server: Server, ours: Reference) -> None:
    items = scene_items(counted(100))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(server.ask, items))
    for item, (answer, tokens) in zip(items, found, strict=True):
        (expected,) = ours.ask([item], SETTINGS)
        assert answer == ours.processor.decode(expected.ids, skip_special_tokens=True).strip()
        assert tokens == expected.prompt
    metrics = server.get("/metrics").decode()
    (line,) = [line for line in metrics.splitlines() if line.startswith("vllm:prompt_tokens_total{")]
    assert float(line.split()[-1]) == sum(tokens for _, tokens in found)


def test_a_strength_over_http(server: Server, ours: Reference) -> None:
    (item,) = scene_items(1)
    for strength, settings in (({"illava_vit_r": 0}, None), ({"illava_vit_r": 0.5}, {**SETTINGS, "vit_r": 0.5})):
        (expected,) = ours.ask([item], settings)
        answer, tokens = server.ask(item, mm_processor_kwargs=strength)
        assert answer == ours.processor.decode(expected.ids, skip_special_tokens=True).strip()
        assert tokens == expected.prompt


def test_a_wrong_strength_is_the_clients_fault(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.ask(scene_items(1)[0], mm_processor_kwargs={"illava_vit_r": 1.5})
    assert refused.value.code == 400 and b"vit_r is 1.5" in refused.value.read()
    server.ask(scene_items(1)[0])
