"""The demo page in a real browser, headless: what a visitor sees, and that nothing comes from another host.

Pictures of the page at the widths of a desktop, a tablet and a phone are left in `build/demo-screenshots`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo_server import Server, serving
from illava_hooks import tiny

SHOTS = Path(__file__).parents[2] / "build" / "demo-screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

DESKTOP, TABLET, PHONE = (1440, 900), (768, 1024), (390, 844)
SIZES = {DESKTOP: "desktop", TABLET: "tablet", PHONE: "phone"}
SCENE = str(tiny.media("scene.png"))
CLIP = str(tiny.media("clip.gif"))
PAIR = [str(tiny.media(f"pair/{name}.png")) for name in ("first", "second")]
WAIT_MS = 60_000
#: The addresses of the input and of the merged picture, which name their content.
SOURCES = "[...document.querySelectorAll('#map-picture img')].map(one => one.getAttribute('src')).join(' ')"


class Visitor:
    """One browser window of its own, that notes what it loads and what goes wrong."""

    def __init__(self, browser: Any, url: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page: Any = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.goto(url)
        self.page.wait_for_selector("#ask")

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {message.location.get('url', '')}")

    def upload(self, *files: str | Path) -> None:
        self.page.set_input_files("#files input[type=file]", [str(file) for file in files])
        for file in files:  # the page cuts long names
            self.page.locator("#files .file-preview", has_text=Path(file).stem[:6]).wait_for()

    def ask(self, question: str | None = None) -> None:
        if question is not None:
            self.page.fill("#question textarea", question)
        self.page.click("#ask")

    def ask_twice(self) -> None:
        """The example's question about the scene, and one of its own, each until all is there."""
        self.page.get_by_role("button", name="Scene").click()
        self.wait_for_chat(*TRIANGLES)
        self.page.wait_for_selector("#map-picture img")
        self.ask(STAR[0])
        self.wait_for_chat(*TRIANGLES, *STAR)
        self.page.wait_for_selector("#map-picture img")

    def caption(self) -> str:
        found: str = self.page.input_value("#map-caption textarea")
        return found

    def chat(self) -> list[str]:
        """What stands in the chat, line by line: questions, and answers with their side in front."""
        found: list[str] = self.page.locator("#chat .message").all_inner_texts()
        return [text.strip() for text in found]

    def wait_for_chat(self, *lines: str) -> None:
        """Until these are the chat, and all is there that comes with them."""
        self.page.wait_for_function(
            """lines => JSON.stringify([...document.querySelectorAll('#chat .message')]
            .map(one => one.innerText.trim())) === JSON.stringify(lines) && document.querySelector('#costs table')""",
            arg=list(lines),
        )

    def wait_for_hint(self, text: str) -> None:
        """Until this stands in place of a chat."""
        self.page.wait_for_function(
            """text => document.querySelector('#chat').innerText.includes(text)
            && !document.querySelector('#chat .message')""",
            arg=text,
        )

    def check_clean(self) -> None:
        """Nothing is left of a chat that is over."""
        for place in ("#notes .note", "#headline p", "#costs table"):
            assert self.page.query_selector(place) is None, place
        assert not self.page.is_visible("#map")

    def type_fraction(self, number: str) -> None:
        """Types into the number beside the slider, and goes on to the next field."""
        self.page.fill("#keep input[type=number]", number)
        self.page.keyboard.press("Tab")

    def wait_for_caption(self, text: str) -> None:
        self.page.wait_for_function(
            "text => document.querySelector('#map-caption textarea')?.value.includes(text)", arg=text
        )

    def map_source(self) -> str:
        """The addresses of the two pictures that lie on each other."""
        found: str = self.page.evaluate(SOURCES)
        return found

    def wait_for_another(self, before: str) -> str:
        """Until a picture has changed; what there is then."""
        self.page.wait_for_function(f"before => {SOURCES} !== before", arg=before)
        return self.map_source()

    def go_to(self, name: str) -> str:
        """Chooses a position by its name; the address of the picture that comes."""
        before = self.map_source()
        self.page.locator("#step").get_by_label(name, exact=True).check()
        return self.wait_for_another(before)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return found

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(600)  # until the last picture is painted
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def leave(self) -> None:
        """Closes the window; nothing may have come from elsewhere, and nothing may have failed."""
        self.context.close()
        others = [url for url in self.requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
        assert self.requests and others == []
        assert self.errors == []


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-file-size", "1") as running:
        yield running
        assert running.hosts() == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # type: ignore[import-not-found,unused-ignore]

    nothing_else = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", nothing_else])
        yield chromium
        chromium.close()


@pytest.fixture
def visitor(browser: Any, server: Server) -> Iterator[Visitor]:
    one = Visitor(browser, server.url)
    yield one
    one.leave()


TRIANGLES = ("how many triangles are there ?", "Without merging: 2", "With merging: 2")
STAR = ("what color is the star ?", "Without merging: blue", "With merging: blue")


def test_upload_and_ask(visitor: Visitor) -> None:
    visitor.upload(SCENE)
    visitor.page.wait_for_selector("#preview img")
    visitor.ask(TRIANGLES[0])
    visitor.page.wait_for_selector("#map-picture img")
    assert visitor.chat() == list(TRIANGLES) and visitor.page.input_value("#question textarea") == ""
    table = visitor.page.inner_text("#costs table")
    assert "320 → 240 → 160" in table and re.search(r"KV cache\s+2.3x\s+0.799 MB\s+0.349 MB", table)
    assert re.search(r"medians of \d measurements in turn", visitor.page.inner_text("#costs"))
    assert visitor.page.inner_text("#headline").startswith("2.7x fewer visual tokens")
    assert visitor.caption() == "Language model, from layer 2: 123 of 336 tokens are left (37%)."


def test_a_chat(visitor: Visitor) -> None:
    """A second question keeps the picture and the turns; it is asked again in its place; a new chat begins anew."""
    visitor.ask_twice()
    assert "trained on single questions" in visitor.page.inner_text("#notes")
    assert re.search(r"Prompt tokens\s+360\s+360", visitor.page.inner_text("#costs table")), "the turn before is in it"
    visitor.page.get_by_label("On", exact=True).check()
    visitor.page.click("#again")
    visitor.wait_for_chat(*TRIANGLES, STAR[0], STAR[2])
    visitor.page.wait_for_selector("#map-picture img")
    visitor.page.click("#fresh")
    visitor.wait_for_hint("A new chat about scene.png")
    visitor.check_clean()
    visitor.ask(STAR[0])
    visitor.wait_for_chat(STAR[0], STAR[2])
    visitor.page.wait_for_selector("#map-picture img")
    assert re.search(r"Prompt tokens\s+347", visitor.page.inner_text("#costs table"))
    visitor.page.get_by_role("button", name="Digits").click()
    visitor.wait_for_chat("is there a green digit ?", "With merging: yes")


def test_a_new_chat_while_an_answer_is_on_its_way(visitor: Visitor) -> None:
    """What was asked before does not come behind it."""
    visitor.upload(SCENE)
    visitor.wait_for_hint("A new chat about scene.png")
    visitor.ask(TRIANGLES[0])
    visitor.page.wait_for_selector("#chat .message")
    visitor.page.click("#fresh")
    visitor.page.wait_for_timeout(4000)
    assert visitor.chat() == []
    visitor.check_clean()
    visitor.ask(STAR[0])
    visitor.wait_for_chat(*STAR)


def test_uploads_add_up_but_a_video_comes_alone(visitor: Visitor) -> None:
    """Each begins a new chat, with nothing left of the last one, and says what it is about."""
    visitor.page.get_by_role("button", name="Scene").click()
    visitor.wait_for_chat(*TRIANGLES)
    visitor.page.wait_for_selector("#map-picture img")
    visitor.upload(PAIR[0])
    visitor.wait_for_hint("A new chat about 2 images")
    visitor.check_clean()
    assert visitor.page.locator("#preview img").count() == 2
    visitor.upload(CLIP)
    visitor.wait_for_hint("so the upload took the place of what lay there. A new chat about clip.gif")
    visitor.page.wait_for_function("() => document.querySelectorAll('#files .filename').length === 1")
    visitor.ask("which way does the circle move ?")
    visitor.page.wait_for_selector("#map-picture img")
    assert len(visitor.chat()) == 3
    visitor.upload(SCENE)
    visitor.wait_for_hint("A new chat about scene.png")
    visitor.check_clean()
    visitor.page.wait_for_function("() => document.querySelectorAll('#files .filename').length === 1")
    assert "common." not in visitor.page.inner_text("body")
    assert visitor.page.locator("[title*='common.'], [aria-label*='common.']").count() == 0, "all texts are words"
    visitor.page.click("#files button[aria-label='Clear']")
    visitor.wait_for_hint("Choose an example, or upload a picture")
    visitor.page.wait_for_selector("#preview img", state="hidden")


def test_an_empty_question_is_the_pages(visitor: Visitor) -> None:
    """At the beginning of a chat, and said to be; later nothing is asked."""
    visitor.upload(SCENE)
    visitor.wait_for_hint("A new chat about scene.png")
    visitor.ask("  ")
    own = "how many circles are there ?\n\nThe page's question, as the field was empty."
    visitor.wait_for_chat(own, "Without merging: 1", "With merging: 1")
    visitor.page.wait_for_selector("#map-picture img")
    visitor.ask("")
    visitor.page.wait_for_selector("#notes .failed")
    assert "the question is empty; type one" in visitor.page.inner_text("#notes")
    assert len(visitor.chat()) == 3
    visitor.page.click("#again")
    visitor.page.wait_for_selector("#map-picture img")
    assert visitor.chat()[0] == own and len(visitor.chat()) == 3


def test_a_fraction_out_of_range(visitor: Visitor) -> None:
    """Stands as it was typed, is told in one line where it is typed and where it is asked, and nothing is asked."""
    visitor.upload(SCENE)
    visitor.page.get_by_text("Settings of merging").click()
    for number in ("7", "-1", "1.01"):
        visitor.type_fraction(number)
        visitor.page.wait_for_function(
            "text => document.querySelector('#says').innerText.includes(text)",
            arg=f"'Visual tokens kept' is {number}; give a fraction up to 1",
        )
        assert visitor.page.input_value("#keep input[type=number]") == number
    visitor.ask(STAR[0])
    visitor.page.wait_for_selector("#notes .failed")
    assert visitor.page.inner_text("#notes").strip() == visitor.page.inner_text("#says").strip()
    assert visitor.chat() == [] and visitor.page.input_value("#question textarea") == STAR[0]
    assert visitor.page.get_by_text("Error", exact=True).count() == 0
    visitor.type_fraction("0.2")
    visitor.page.wait_for_function("() => document.querySelector('#says').innerText.includes('20% of the tokens')")
    visitor.ask()
    visitor.wait_for_chat(*STAR)


def test_each_layer_has_a_name(visitor: Visitor) -> None:
    visitor.page.get_by_role("button", name="Scene").click()
    visitor.page.wait_for_selector("#map-picture img")
    seen = [visitor.map_source()]
    for name, words in (
        ("Encoder layer 4", "after layer 4: 160 of 320 patches"),
        ("Encoder layer 3", "after layer 3: 240 of 320 patches"),
        ("Input", "The input"),
    ):
        seen.append(visitor.go_to(name))
        visitor.wait_for_caption(words)
    assert len(set(seen)) == 4
    assert visitor.go_to("Encoder layer 3") == seen[2], "the same layer is the same picture"
    visitor.page.get_by_label("Colour what was merged").uncheck()
    grey = visitor.wait_for_another(seen[2])
    visitor.page.get_by_label("Colour what was merged").check()
    assert visitor.wait_for_another(grey) == seen[2]


def test_the_play_button_steps_through_the_layers(visitor: Visitor) -> None:
    """From the input to the last layer, where it stops; pressed in between it stops there."""
    visitor.page.get_by_role("button", name="Scene").click()
    visitor.page.wait_for_selector("#map-picture img")
    visitor.page.click("#play")
    for words in ("The input", "after layer 3", "after layer 4", "from layer 2"):
        visitor.wait_for_caption(words)
    visitor.page.wait_for_function("() => document.querySelector('#play').innerText.includes('Play')")
    assert visitor.page.locator("#step").get_by_label("Decoder layer 2").is_checked()
    visitor.page.click("#play")
    visitor.wait_for_caption("after layer 3")
    visitor.page.click("#play")
    visitor.page.wait_for_function("() => document.querySelector('#play').innerText.includes('Play')")
    stands = visitor.caption()
    visitor.page.wait_for_timeout(4000)
    assert visitor.caption() == stands


def test_merging_on_and_off(visitor: Visitor) -> None:
    visitor.upload(SCENE)
    visitor.page.get_by_label("Off", exact=True).check()
    visitor.ask(TRIANGLES[0])
    visitor.wait_for_chat(*TRIANGLES[:2])
    assert not visitor.page.is_visible("#map-picture")
    visitor.page.get_by_label("On", exact=True).check()
    visitor.page.click("#again")
    visitor.wait_for_chat(TRIANGLES[0], TRIANGLES[2])
    visitor.page.wait_for_selector("#map-picture img")


def test_settings(visitor: Visitor) -> None:
    visitor.upload(SCENE)
    visitor.page.get_by_text("Settings of merging").click()
    visitor.page.fill("#vit_layers textarea", "9")
    visitor.page.wait_for_selector("#says .failed")
    assert "this model allows 0..7" in visitor.page.inner_text("#says")
    visitor.shoot("desktop-wrong-setting")
    visitor.page.fill("#vit_layers textarea", "1-5")
    visitor.page.fill("#vit_r textarea", "8")
    visitor.page.fill("#llm_layers textarea", "none")
    visitor.page.wait_for_function(
        "() => document.querySelector('#says').innerText.includes('encoder layers 1, 5 each remove 8 of the patches.')"
    )
    visitor.page.click("#method input")
    visitor.page.get_by_role("option", name="tome").click()
    visitor.ask("how many triangles are there ?")
    visitor.page.wait_for_selector("#map-picture img")
    assert "320 → 280 → 240" in visitor.page.inner_text("#costs table")
    assert visitor.caption().startswith("Vision encoder, after layer 5: 240 of 320")


def test_a_broken_file(visitor: Visitor, tmp_path: Path) -> None:
    broken = tmp_path / "<b>bold<b>.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    visitor.page.set_input_files("#files input[type=file]", str(broken))
    visitor.page.wait_for_selector("#notes .failed")
    told = visitor.page.inner_text("#notes")
    assert "cannot be read as an image or a video" in told and "/" not in told.split(":")[0]
    visitor.ask("what is this ?")
    visitor.page.wait_for_timeout(500)
    visitor.page.wait_for_selector("#notes .failed")
    visitor.shoot("desktop-broken-file")
    visitor.page.get_by_role("button", name="Scene").click()
    visitor.wait_for_chat(*TRIANGLES)
    assert visitor.page.query_selector("#notes .failed") is None


def test_a_large_file(browser: Any, server: Server, tmp_path: Path) -> None:
    visitor = Visitor(browser, server.url)
    (tmp_path / "film.mp4").write_bytes(bytes(2**20 + 1))
    visitor.page.set_input_files("#files input[type=file]", str(tmp_path / "film.mp4"))
    visitor.page.get_by_text(re.compile("maximum allowed|exceeds|too large", re.I)).first.wait_for()
    visitor.shoot("desktop-large-file")
    visitor.page.get_by_role("button", name="Scene").click()
    visitor.wait_for_chat(*TRIANGLES)
    # The page's script also asks, on a slow machine too late, how far the upload has come, and says what it got.
    known = re.compile(r"413|404 .*/upload_progress|^Response http")
    visitor.errors = [error for error in visitor.errors if not known.search(error)]
    visitor.leave()


def test_two_visitors_at_once(browser: Any, server: Server) -> None:
    """Each sees the answers to the own question, with the own settings."""
    one, other = Visitor(browser, server.url), Visitor(browser, server.url)
    one.upload(SCENE)
    other.upload(*PAIR)
    other.page.get_by_text("Settings of merging").click()
    other.page.fill("#vit_layers textarea", "3")
    asked = "how many circles are in the second image ?"
    one.ask(TRIANGLES[0])
    other.ask(asked)
    for _ in range(2):
        one.wait_for_chat(*TRIANGLES)
        other.wait_for_chat(asked, "Without merging: 1", "With merging: 1")
        for visitor, steps in ((one, "320 → 240 → 160"), (other, "128 → 96")):
            visitor.page.wait_for_selector("#map-picture img")
            assert steps in visitor.page.inner_text("#costs table")
        assert "→ 64" not in other.page.inner_text("#costs table")
        one.page.click("#again")
        other.page.click("#again")
        one.page.wait_for_selector("#map-picture", state="hidden")
    one.leave()
    other.leave()


@pytest.mark.parametrize("size", SIZES, ids=SIZES.values())
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chat_fits_the_window(browser: Any, server: Server, size: tuple[int, int], scheme: str) -> None:
    """Before anything is asked, and with two turns, whose last answer can be seen."""
    visitor = Visitor(browser, server.url, size, scheme)
    assert visitor.overflow() <= 0
    visitor.shoot(f"{SIZES[size]}-{scheme}-empty")
    visitor.ask_twice()
    visitor.page.wait_for_timeout(500)
    log, last = (
        visitor.page.locator("#chat").bounding_box(),
        visitor.page.locator("#chat .message").last.bounding_box(),
    )
    assert log["y"] < last["y"] and last["y"] + last["height"] <= log["y"] + log["height"]
    assert visitor.overflow() <= 0
    visitor.shoot(f"{SIZES[size]}-{scheme}-chat")
    visitor.leave()


@pytest.mark.parametrize("size", SIZES, ids=SIZES.values())
@pytest.mark.parametrize("example", ["Digits", "Two images", "Clip"])
def test_examples_fit_the_window(browser: Any, server: Server, size: tuple[int, int], example: str) -> None:
    scheme = "dark" if example in ("Digits", "Clip") else "light"
    visitor = Visitor(browser, server.url, size, scheme)
    name = f"{SIZES[size]}-{example.lower().replace(' ', '-')}"
    assert visitor.overflow() <= 0
    visitor.page.get_by_role("button", name=example).click()
    visitor.page.wait_for_selector("#map-picture img")
    assert [line.split(":")[0] for line in visitor.chat()[1:]] == ["Without merging", "With merging"]
    assert visitor.overflow() <= 0
    visitor.shoot(name)
    visitor.leave()
