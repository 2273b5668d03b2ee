"""A server of the demo page in a process of its own, whose sockets reach this machine only; and what tests ask of it.

Run as a program it is that process: the first argument is a file that gets the name of every other host that it tried
to reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTS_S = 180  # a busy machine takes long to import all that is needed


@dataclass
class Server:
    """A running server.

    Attributes:
        url: of the page.
        process: the server itself.
        folder: what it has for temporary files.
        others: the file that lists other hosts.
    """

    url: str
    process: subprocess.Popen[str]
    folder: Path
    others: Path

    def hosts(self) -> list[str]:
        """Hosts other than this machine that the server tried to reach."""
        return self.others.read_text().split() if self.others.exists() else []

    def stop(self, number: signal.Signals) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def serving(*options: str) -> Iterator[Server]:
    """Runs `illava-hooks demo` on a free port while the context is open."""
    with tempfile.TemporaryDirectory() as folder:
        others, temporary = Path(folder) / "others", Path(folder) / "tmp"
        temporary.mkdir()
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
        command = [sys.executable, __file__, str(others), "demo", "--port", "0", *options]
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | quiet, cwd=folder
            )
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line.startswith("http://"), f"no server: {line}{Path(log.name).read_text()}"
                yield Server(line.split()[0], process, temporary, others)
            finally:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()


def fetch(url: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> tuple[int, Any, bytes]:
    """Status, headers and body of a request, whatever proxies the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data, headers or {}), timeout=60) as answered:
            return answered.status, answered.headers, answered.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def upload(url: str, name: str, content: bytes) -> tuple[int, Any]:
    """Sends a file as a browser does; status, and what the server answers."""
    edge = "edge-of-a-part"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
    status, _, answered = fetch(f"{url}gradio_api/upload", kind, body)
    return status, json.loads(answered) if status == 200 else answered.decode()


def call(url: str, name: str, data: list[Any]) -> list[dict[str, Any]]:
    """Calls a handler through the queue, as the page does; the events that come back."""
    config = json.loads(fetch(f"{url}config")[2])
    index = next(one["id"] for one in config["dependencies"] if one["api_name"] == name)
    session = str(time.perf_counter_ns())
    body = json.dumps({"data": data, "fn_index": index, "session_hash": session}).encode()
    status, _, answered = fetch(f"{url}gradio_api/queue/join", {"Content-Type": "application/json"}, body)
    assert status == 200, answered
    stream = fetch(f"{url}gradio_api/queue/data?session_hash={session}")[2]
    return [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: ")]


def _only_here(others: Path) -> None:
    """Makes every socket of this process refuse to leave the machine."""
    here = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)

    def note(host: Any) -> None:
        if host not in here:
            with others.open("a") as file:
                print(host, file=file)
            raise ConnectionRefusedError(f"{host} is another host")

    def guarded(name: str, where: Any) -> None:
        stock = getattr(where, name)

        def checked(*args: Any, **kwargs: Any) -> Any:
            address = args[0] if where is socket else args[1]
            if where is socket or isinstance(address, tuple):  # all but the name of a local socket
                note(address if where is socket else address[0])
            return stock(*args, **kwargs)

        setattr(where, name, checked)

    guarded("getaddrinfo", socket)
    for name in ("connect", "connect_ex"):
        guarded(name, socket.socket)


if __name__ == "__main__":
    _only_here(Path(sys.argv.pop(1)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs behind its back ignores Ctrl-C
    from illava_hooks.cli import app

    app()
