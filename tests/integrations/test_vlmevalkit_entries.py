"""The merged models for VLMEvalKit: its own entries, with a class whose model merges. A stand-in plays the kit."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from families import families, family_of
from harness_names import OTHER_ENGINE, VLMEVALKIT
from illava_hooks import MergeConfigError, UnsupportedModelError, patch, session_of, tiny
from illava_hooks.errors import InputError
from illava_hooks.integrations import vlmevalkit
from illava_hooks.tools.loading import load_model

#: How the kit calls the families that it has.
KITS = {name: kit for name in families(embedded=True) if (kit := family_of(name).vlmevalkit) is not None}
#: One family with its entry, and one that has other entries.
FIRST, STOCK = next((name, kit.entries[0]) for name, kit in KITS.items())
OTHER, BESIDE = next((kit, kit.others[0]) for kit in KITS.values() if kit.others)


class Loader:
    """A class of the kit, as far as the integration knows it."""

    def __init__(self, model_path: str, **arguments: Any) -> None:
        self.model = load_model(model_path)[0]
        self.arguments = arguments


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The models of a stand-in for the kit, whose ``run.main`` keeps what it is started with."""
    kit, config, run = ModuleType("vlmeval"), ModuleType("vlmeval.config"), ModuleType("vlmeval.run")
    found: dict[str, Any] = {"Some-API": object()}
    assert {family: set(names) for family, names in vlmevalkit.STOCK.items()} == {
        **{family: set(kit.entries) for family, kit in KITS.items()},
        **{family: set(names) for family, names in VLMEVALKIT.items()},
    }
    for known in KITS.values():
        for name in (*known.others, *known.entries):
            found[name] = partial(Loader, model_path=f"{known.hub}/{name}", **known.arguments)
    for name in (name for names in VLMEVALKIT.values() for name in names):
        engine = {"use_vllm": True} if name in OTHER_ENGINE else {}
        found[name] = partial(Loader, model_path=f"somebody/{name}", temperature=0.7, **engine)
    started: list[list[str]] = []
    vars(config)["supported_VLM"] = found
    vars(run).update(main=lambda: started.append(sys.argv[1:]), started=started)
    vars(kit).update(config=config, run=run)
    for module in (kit, config, run):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


class TestRegistering:
    def test_entries_keep_what_the_kit_says(self, entries: dict[str, Any]) -> None:
        before = dict(entries)
        names = vlmevalkit.register()
        stocks = [name for family in vlmevalkit.STOCK.values() for name in family]
        assert names == [f"{name}-iLLaVA" for name in stocks]
        assert len(names) == 2 * len(KITS) + sum(map(len, VLMEVALKIT.values()))
        assert {name: entry for name, entry in entries.items() if name not in names} == before
        for stock, name in zip(stocks, names, strict=True):
            assert issubclass(entries[name].func, Loader) and entries[name].func is not Loader
            expected = {**before[stock].keywords, "method": "illava", "preset": "auto"}
            assert entries[name].keywords == (expected | {"use_vllm": False} if stock in OTHER_ENGINE else expected)

    @pytest.mark.parametrize(("stock", "family"), [(kit.entries[0], family) for family, kit in KITS.items()])
    def test_an_entry_loads_a_merged_model(self, entries: dict[str, Any], stock: str, family: str) -> None:
        vlmevalkit.register()
        loaded = entries[f"{stock}-iLLaVA"](model_path=str(tiny.folder(family)), use_vllm=False)
        assert isinstance(loaded, Loader)
        assert loaded.arguments == {**KITS[family].arguments, "use_vllm": False}
        session = session_of(loaded.model)
        assert session is not None and session.config == patch(tiny.load(family)[0]).config

    def test_another_engine_is_switched_off_unless_it_is_asked_for(self, entries: dict[str, Any]) -> None:
        vlmevalkit.register()
        name, path = f"{OTHER_ENGINE[0]}-iLLaVA", str(tiny.folder(FIRST))
        assert session_of(entries[name](model_path=path).model) is not None
        with pytest.raises(UnsupportedModelError, match="use_vllm is True; only the model of transformers"):
            entries[name](model_path=path, use_vllm=True)

    def test_settings_of_an_entry_and_of_a_call(self, entries: dict[str, Any]) -> None:
        vlmevalkit.register(vit_layers="2-3", vit_r=0.25, llm_layers=[1], llm_ratio=0.5, method="nearest")
        path = str(tiny.folder(FIRST))
        for given, removed in (({}, 0.25), ({"vit_r": 0.5}, 0.5)):
            session = session_of(entries[f"{STOCK}-iLLaVA"](model_path=path, **given).model)
            assert session is not None
            image = session.config.image
            assert (image.vit_layers, image.vit_r, image.llm_layers, image.llm_ratio) == ((2, 3), removed, (1,), 0.5)
            assert session.config.method.name == "nearest"

    @pytest.mark.parametrize("family", KITS)
    def test_a_folder_of_ones_own(self, entries: dict[str, Any], family: str) -> None:
        path = str(tiny.folder(family))
        assert vlmevalkit.register("mine", path, min_pixels=None) == ["mine"]
        stock = entries[vlmevalkit.STOCK[family][0]]
        kept = {**stock.keywords, "model_path": path, "min_pixels": None, "method": "illava", "preset": "auto"}
        assert entries["mine"].keywords == kept
        assert session_of(entries["mine"]().model) is not None

    def test_any_entry_of_the_kit_and_a_family_that_is_told(self, entries: dict[str, Any]) -> None:
        assert vlmevalkit.register(f"{BESIDE}-iLLaVA") == [f"{BESIDE}-iLLaVA"]
        assert entries[f"{BESIDE}-iLLaVA"].keywords["model_path"] == f"{OTHER.hub}/{BESIDE}"
        vlmevalkit.register("far", "nobody/far-away", family=FIRST)
        assert entries["far"].keywords["model_path"] == "nobody/far-away"

    def test_refusals(self, entries: dict[str, Any], tmp_path: Path) -> None:
        before = dict(entries)
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        cases: list[tuple[dict[str, Any], str]] = [
            ({"name": STOCK}, "behind it"),
            ({"name": "Some-API-iLLaVA"}, "behind it"),
            ({"model_path": "a/b"}, "give the entry a name"),
            ({"name": "mine", "model_path": "nobody/far-away"}, "cannot be read"),
            ({"name": "mine", "model_path": str(tmp_path)}, "is 'gpt2'; it must be one of"),
            ({"name": "mine", "model_path": "a/b", "family": "somebody"}, "is 'somebody'; it must be one of"),
            ({"vit_layers": "5 to 8"}, "write layer numbers as"),
        ]
        for given, message in cases:
            with pytest.raises(InputError, match=message):
                vlmevalkit.register(**given)
        with pytest.raises(MergeConfigError, match="method is 'best'"):
            vlmevalkit.register(method="best")
        assert entries == before

    def test_other_engines_are_refused(self, entries: dict[str, Any]) -> None:
        vlmevalkit.register()
        with pytest.raises(UnsupportedModelError, match="use_vllm is True; only the model of transformers"):
            entries[f"{STOCK}-iLLaVA"](use_vllm=True)

    def test_the_kit_is_needed_only_when_it_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "vlmeval", None)
        with pytest.raises(InputError, match="pip install ms-vlmeval"):
            vlmevalkit.register()


class TestTheCommand:
    def test_hands_on_what_is_the_kits(self, entries: dict[str, Any]) -> None:
        before = list(sys.argv)
        folder = str(tiny.folder(FIRST))
        line = [
            "--data",
            "MME",
            "POPE",
            "--vit-r",
            "0.5",
            "--model",
            "a",
            "b",
            "--add",
            f"mine={folder}",
            "--mode",
            "infer",
        ]
        vlmevalkit.main(line)
        assert sys.modules["vlmeval.run"].started == [
            ["--data", "MME", "POPE", "--model", "a", "b", "--mode", "infer"]
        ]
        assert sys.argv == before
        assert entries["mine"].keywords["vit_r"] == entries[f"{STOCK}-iLLaVA"].keywords["vit_r"] == 0.5

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (["--add", "mine"], "write NAME=PATH"),
            (["--method", "best"], "method is 'best'"),
            (["--method", "nowhere.py:mine"], "there is no file 'nowhere.py'"),
            (["--vit-r", "much"], "vit_r is 'much'"),
        ],
    )
    def test_refuses_in_one_line(
        self, entries: dict[str, Any], capsys: pytest.CaptureFixture[str], line: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            vlmevalkit.main(line)
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
        assert sys.modules["vlmeval.run"].started == []
