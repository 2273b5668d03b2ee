"""Serves the page from this machine, to this machine: no other host is called, no file stays."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

from illava_hooks import tiny
from illava_hooks.demo.engine import Engine
from illava_hooks.demo.extra import gradio
from illava_hooks.demo.look import CSS, FONTS, MONO, READABLE, WORDS
from illava_hooks.demo.page import Page
from illava_hooks.errors import InputError

__all__ = ["LOCAL", "is_local", "serve", "serving"]

LOCAL = "127.0.0.1"

#: What the browser may load: this server's files and nothing else. Gradio's page has inline scripts and templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; form-action 'self'; frame-ancestors 'self'; object-src 'none'; base-uri 'self'"
)
_HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class Guard:
    """ASGI middleware: sends the policy, and refuses names that other pages could point at a local server."""

    def __init__(self, app: Any, hosts: tuple[str, ...] | None) -> None:
        """Around ``app``; ``hosts`` are the names by which it may be called, None: any."""
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)  # type: ignore[no-any-return]
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rpartition("]")
        name = f"{host[0]}]" if host[1] else host[2].partition(":")[0]
        if self.hosts is not None and name.lower() not in self.hosts:
            await send({"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"unknown host"})  # type: ignore[no-any-return]

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0].lower() not in _HEADERS]
                message = {**message, "headers": [*kept, *_HEADERS.items()]}
            await send(message)

        return await self.app(scope, receive, guarded)  # type: ignore[no-any-return]


def is_local(host: str) -> bool:
    """Whether only this machine can reach what is served there."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@contextmanager
def _private() -> Iterator[None]:
    """An environment without telemetry, in which gradio's files go to a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="illava-hooks-demo-", ignore_cleanup_errors=True) as folder:
        local = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), LOCAL, "localhost")))
        wanted = {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_EXAMPLES_CACHE": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": local,  # gradio asks itself whether it is there
            "no_proxy": local,
        }
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            from huggingface_hub import constants

            constants.HF_HUB_DISABLE_TELEMETRY = True  # it read the environment when it was imported
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def serving(engine: Engine, host: str = LOCAL, port: int = 0, max_megabytes: int = 100) -> Iterator[str]:
    """Serves the page while the context is open.

    Args:
        engine: what answers.
        host: the address to listen on.
        port: 0 takes a free one.
        max_megabytes: largest file that can be uploaded.

    Yields:
        The page's address.

    Raises:
        InputError: gradio is missing, or the address cannot be used.
    """
    with _private():
        gr = gradio()
        page = Page(engine).build()
        page.queue(max_size=64, api_open=False)
        host = host.strip("[]")
        name = f"[{host}]" if ":" in host else host  # as it stands in an address
        names = (LOCAL, "localhost", "[::1]", name.lower()) if is_local(host) else None
        try:
            if not port:
                with socket.create_server((host, 0), family=_family(host)) as free:
                    port = free.getsockname()[1]
            _, url, _ = page.launch(
                server_name=name, server_port=port, max_file_size=max_megabytes * 2**20, quiet=True, share=False,
                prevent_thread_lock=True, footer_links=[], show_error=True, run_history=False, ssr_mode=False,
                mcp_server=False, pwa=False, enable_monitoring=False, strict_cors=True, state_session_capacity=64,
                allowed_paths=[str(tiny.media("scene.png").parent)], css=CSS,
                theme=gr.themes.Base(font=FONTS, font_mono=MONO, primary_hue="teal").set(**READABLE),
                i18n=gr.I18n(en=WORDS), app_kwargs={"middleware": [(Guard, (), {"hosts": names})]},
            )  # fmt: skip
        except (OSError, ValueError) as error:
            page.close(verbose=False)
            cure = "give another --port (0: any that is free), or the --host of this machine"
            raise InputError(
                f"nothing can be served at {name}:{port} ({' '.join(str(error).split())}); {cure}"
            ) from error
        try:
            yield url
        finally:
            engine.close()
            page.close(verbose=False)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def serve(engine: Engine, host: str, port: int, max_megabytes: int, browser: bool, say: Callable[[str], None]) -> None:
    """Serves until Ctrl-C or a signal that ends the process; files are removed in every case.

    Raises:
        SystemExit: after SIGTERM or SIGHUP, with 128 + its number.
        KeyboardInterrupt: after Ctrl-C.
    """

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, leave)
    with serving(engine, host, port, max_megabytes) as url:
        say(f"{url} (Ctrl-C ends it)")
        if not is_local(host):
            say(f"note: everybody who can reach {host} can use this page; there is no password")
        if browser:
            webbrowser.open(url)
        threading.Event().wait()
