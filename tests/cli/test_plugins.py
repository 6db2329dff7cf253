"""Methods of other packages: what is wrong with one is told with its package's name, and its code is what it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bdbench import plugins, stages
from bdbench.errors import MethodError, SourceWarning
from bdbench.registry import ATTACKS, DEFENSES, REGISTRIES, plugin_sources
from bdbench.sweeps import worker

STRIPE = '''
"""A plugin."""
import torch
from bdbench.attacks.base import Attack


class Stripe(Attack):
    """Brightens one row of pixels.

    More."""

    def fit(self, clean, lab):
        return {"value": torch.tensor(99)}

    def stamp(self, images, state, occasion):
        images[:, :, 0] = 255
        return images
'''
METHODS = '''
from bdbench.defenses.base import Defense
from bdbench.defenses.training.plain import NoDefense


class Bare(NoDefense):
    presets = {}

    def run(self, task):
        raise AssertionError


class Odd(NoDefense):
    """Fails."""

    def run(self, task):
        return {}["lost"]


class Rude(NoDefense):
    """Returns no Defended."""

    def run(self, task):
        return super().run(task).model


class Half(Defense):
    presets = {"tiny": {}}
'''
POINTS = """
[bdbench.attacks]
stripe = mypackage.stripe:Stripe
gone = mypackage.nothere:Stripe
module = mypackage.stripe:torch
badnets = mypackage.stripe:Stripe
[bdbench.defenses]
bare = mypackage.methods:Bare
odd = mypackage.methods:Odd
rude = mypackage.methods:Rude
half = mypackage.methods:Half
"""

Write = Callable[[str], None]


def forget() -> None:
    for registry in REGISTRIES.values():
        for name in ("rows", "plugins"):
            registry.__dict__.pop(name, None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


@pytest.fixture
def write(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Install a package with plugins, and give what writes the module of its attack anew."""
    package, described = here / "site" / "mypackage", here / "site" / "mypackage-1.0.dist-info"
    package.mkdir(parents=True)
    described.mkdir()
    (package / "methods.py").write_text(METHODS)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(here / "site")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions of a module may be of one second

    def written(code: str) -> None:
        (package / "stripe.py").write_text(code)
        forget()

    written(STRIPE)
    yield written
    forget()


@pytest.mark.parametrize("fault", ["raise SystemExit(3)", "1/0", "def (", "import sys; sys.exit('no licence')", "\0"])
def test_a_module_that_fails_or_exits_when_it_is_imported_is_broken(write: Write, bdbench: Any, fault: str) -> None:
    write(fault)
    result = bdbench("list", "attacks", "--json")
    rows = {row["name"]: row for row in result.json}
    assert result.code == 0
    assert rows["stripe"]["broken"].startswith("cannot be imported: ")
    used = bdbench("poison", "--attack", "stripe")
    assert used.code == 1
    assert "plugin stripe of mypackage cannot be imported: " in used.err


def test_what_a_module_prints_when_it_is_imported_is_no_part_of_a_document(write: Write, bdbench: Any) -> None:
    write(f"print('hello')\n{STRIPE}")
    result = bdbench("list", "attacks", "--json")
    assert result.json
    assert "hello" in result.err


def test_a_method_that_exits_is_an_error(write: Write, bdbench: Any) -> None:
    write(STRIPE.replace("        images[:, :, 0] = 255", "        raise SystemExit(0)"))
    used = bdbench("poison", "--attack", "stripe", "--images", 100)
    assert used.code == 1
    assert "plugin stripe of mypackage failed in " in used.err


def test_a_plugin_is_listed_by_its_docstring_and_a_broken_one_by_its_fault(write: Write, bdbench: Any) -> None:
    rows = {row["name"]: row for row in bdbench("list", "attacks", "--json").json}
    assert (rows["stripe"]["summary"], rows["stripe"]["plugin"]) == ("Brightens one row of pixels.", "mypackage 1.0")
    assert rows["gone"]["broken"] == "cannot be imported: ModuleNotFoundError: No module named 'mypackage.nothere'"
    assert "is no subclass of bdbench.attacks.base.Attack" in rows["module"]["broken"]
    assert (rows["badnets"]["plugin"], rows["badnets"]["broken"]) == (None, None)
    shown = bdbench("list").out
    assert "broken: cannot be imported" in shown
    assert "plugin of mypackage 1.0" in shown
    assert "plugin: mypackage 1.0" in bdbench("show", "stripe").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("poison", "--attack", "gone"), "plugin gone of mypackage cannot be imported: ModuleNotFoundError"),
        (("poison", "--attack", "module"), "plugin module of mypackage cannot be used: mypackage.stripe:torch is no"),
        (("show", "bare"), "plugin bare of mypackage cannot be used: mypackage.methods:Bare has no `presets`"),
        (("show", "half"), "mypackage.methods:Half does not define run"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_with_its_package(
    write: Write, bdbench: Any, words: tuple[str, ...], said: str
) -> None:
    result = bdbench(*words)
    assert (result.code, "Traceback" in result.err) == (1, False)
    assert said in result.err


def test_what_fails_in_a_plugin_is_told_with_its_line_and_a_traceback_on_demand(
    write: Write, bdbench: Any, toys: Any, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    result = bdbench("defend", toys.path, "--method", "odd", "--out", "odd")
    assert (result.code, "Traceback" in result.err) == (1, False)
    line = METHODS.splitlines().index('        return {}["lost"]') + 1
    assert f"plugin odd of mypackage failed in {here}/site/mypackage/methods.py, line {line}: KeyError" in result.err
    monkeypatch.setenv("BDBENCH_TRACEBACK", "1")
    assert "Traceback" in bdbench("defend", toys.path, "--method", "odd", "--out", "odd").err
    rude = bdbench("defend", toys.path, "--method", "rude", "--epochs", "1", "--out", "rude").err
    assert "plugin rude of mypackage: `run` of defense 'rude' must return Defended(model=...)" in rude


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return images", "the trigger changes no pixel of any of the 11 poisoned training images"),
        ("return images + 0.2", "changes no pixel"),
        ('return images if occasion.use == "test" else 255 - images', "any of the 30 triggered test images"),
        ('return images * float("nan")', "`stamp` gives numbers that are not finite"),
        ("return images[:, :, 1:]", "`stamp` must give images (11, 1, 8, 8), and gives (11, 1, 7, 8)"),
        ("return None", "`stamp` must give images (11, 1, 8, 8), and gives NoneType"),
        ('raise ValueError("no\\nway")', "stripe.py, line 16: ValueError: no; with BDBENCH_TRACEBACK=1"),
    ],
)
def test_a_stamp_that_cannot_be_a_trigger_is_refused(write: Write, toy_archive: Path, body: str, said: str) -> None:
    write(STRIPE.replace("images[:, :, 0] = 255\n        return images", body))
    with pytest.raises(MethodError) as refused:
        stages.poison(toy_archive, "stripe", out=toy_archive.parent / "data")
    assert str(refused.value).startswith("plugin stripe of mypackage")
    assert said in str(refused.value)
    assert not (toy_archive.parent / "data").exists()


def test_a_state_is_a_dictionary_of_tensors(write: Write, toy_archive: Path) -> None:
    write(STRIPE.replace("torch.tensor(99)", "99"))
    with pytest.raises(MethodError, match=r"plugin stripe of mypackage: `fit` must give a dictionary of tensors"):
        stages.poison(toy_archive, "stripe", out=toy_archive.parent / "data")


def test_what_other_code_of_a_plugin_made_is_kept_and_named(
    write: Write, toy_archive: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = toy_archive.parent
    short: dict[str, Any] = {"preset": "tiny", "options": {"epochs": 1}, "out": folder / "model", "device": "cpu"}
    first = stages.poison(toy_archive, "stripe", out=folder / "data")
    model = stages.defend(first.path, **short)
    assert model.manifest.facts["plugins"] == first.manifest.facts["plugins"] == plugin_sources((ATTACKS, "stripe"))
    stages.evaluate(stages.defend(first.path, **short).path, device="cpu")
    assert not [warning for warning in recwarn if warning.category is SourceWarning]
    write(STRIPE.replace("= 255", "= 254"))
    named = r"data is kept as it is, but was made by other code of attack stripe \(mypackage 1.0\); --force makes it"
    with pytest.warns(SourceWarning, match=named):
        kept = stages.poison(toy_archive, "stripe", out=folder / "data")
    assert int(kept.triggered.images[0, 0, 0, 0]) == 255
    forced = stages.poison(toy_archive, "stripe", out=folder / "data", force=True)
    assert (forced.id, int(forced.triggered.images[0, 0, 0, 0])) == (first.id, 254)
    with pytest.warns(SourceWarning, match="model is kept as it is"):
        stages.defend(forced.path, **short)
    with pytest.warns(SourceWarning, match="model-eval is kept as it is"):
        stages.evaluate(stages.defend(forced.path, **short, force=True).path, device="cpu")


def test_a_sweep_sees_other_code_and_replaces_what_it_made(write: Write, toy_archive: Path) -> None:
    order = {"named": [["attack", "stripe", "stripe", {}], ["attack", "badnets", "badnets", {}]], "models": []}
    before = worker.check(order)["methods"]
    out = toy_archive.parent / "data"

    def made(replace: bool) -> int:
        again = worker.when_free(
            lambda force: stages.poison(toy_archive, "stripe", out=out, force=force), replace=replace
        )
        return int(again.triggered.images[0, 0, 0, 0])

    assert made(replace=False) == 255
    write(STRIPE.replace("= 255", "= 254"))
    after = worker.check(order)["methods"]
    assert before["attack badnets"] == after["attack badnets"]
    assert before["attack stripe"] != after["attack stripe"]
    with pytest.warns(SourceWarning):
        assert made(replace=False) == 255
    assert made(replace=True) == 254


def test_the_code_of_a_built_in_method_is_no_fact_of_an_artifact(toys: Any) -> None:
    assert "plugins" not in json.loads((toys.path / "manifest.json").read_text())["facts"]
    assert plugin_sources((ATTACKS, "badnets"), (DEFENSES, "abl")) == {}


def test_a_full_disk_is_nobodys_fault() -> None:
    plugin = plugins.Plugin("attack", "stripe", "mypackage.stripe:Stripe", "mypackage", "1.0")
    with pytest.raises(OSError, match="full"), plugins.blamed(plugin):
        raise OSError(plugins.DISK_FULL[0], "full")
