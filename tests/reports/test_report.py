"""The report: its numbers are the table's, its commands make the same artifacts, and it works in a real browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_tables
from toys import ATTACK_NAMES, toy_compiler, toy_file

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.made import plain
from bdbench.artifacts.manifests import Ask, Manifest
from bdbench.cli.app import run
from bdbench.errors import ArtifactError, DataError
from bdbench.protocol.metric_list import METRICS
from bdbench.registry import ATTACKS
from bdbench.reports import commands, results, tables
from bdbench.reports.matrices import cells_of, matrices_of
from bdbench.reports.page import render, script_json, write_report
from bdbench.reports.runs import FALSE_POSITIVE, Shelf, describe_runs

LIMIT = 2_000_000
NOTHING = Shelf({}, {}, {})
SHORT = {"epochs": 1, "batch_size": 32, "lr": 0.05}
ABL = {**SHORT, "isolation_epochs": 2, "unlearn_steps": 2, "unlearn_step_limit": 0, "unlearn_batch_size": 16}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five evaluations, three cells: badnets undefended and under ABL with two seeds, blended undefended with one."""
    folder = tmp_path_factory.mktemp("grid")
    source, runs = toy_file(folder, train=132), folder / "runs"
    for attack, seed, methods in (("badnets", 0, "none abl"), ("badnets", 1, "none abl"), ("blended", 0, "none")):
        data = stages.poison(source, attack, seed=seed, out=runs / f"{attack}-s{seed}")
        for method in methods.split():
            options = ABL if method == "abl" else SHORT
            model = stages.defend(data.path, method, options=options, out=runs / f"{data.path.name}-{method}")
            stages.evaluate(model.path)
    return runs


@pytest.fixture(scope="module")
def page(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    written = write_report([grid], out)
    assert written == (5, 3, out.stat().st_size)
    return out


def row(defense: str = "none", **other: Any) -> dict[str, Any]:
    """A row as `evaluation_row` gives it, whose artifacts are nowhere."""
    lost = {"evaluation_id": "e", "model_id": "m", "path": "runs/e", "attack_seed": other.get("seed", 0)}
    return test_tables.row(defense, **(lost | other))


def data_of(text: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_rows_of_the_page_are_those_of_the_table(grid: Path, page: Path) -> None:
    assert data_of(page.read_text())["rows"] == results.read_rows([grid])


def test_a_cell_shows_the_mean_and_the_spread_that_the_table_prints(grid: Path, page: Path) -> None:
    merged = {(item["attack"], item["defense"]): item for item in results.merge(results.read_rows([grid]))}
    cells = data_of(page.read_text())["cells"]
    assert {(cell["attack"], cell["defense"]) for cell in cells} == merged.keys()
    for cell in cells:
        expected = merged[cell["attack"], cell["defense"]]
        for name in ("ba", "asr", "floor", "seconds"):
            assert cell[name] == expected[name]
            assert cell.get(f"{name}_sd") == expected[f"{name}_sd"]
        assert f"{expected['asr']:.3f}" in page.read_text()


def test_the_page_says_of_which_folder_and_of_what_images_it_is(page: Path) -> None:
    text = page.read_text()
    assert "<h1>runs: backdoor attacks and defenses</h1>" in text
    assert "5 runs in 3 cells (means over seeds)" in text
    assert f"<dt>floor</dt><dd>{METRICS['floor'].counts}; over: {METRICS['floor'].over}.</dd>" in text
    assert "<dt>ASR, other classes</dt>" not in text  # no row has it
    assert '<h2 id="m0-title">toy <span class="muted">· 8×8 gray · convnet</span></h2>' in text


def test_lift_is_asr_minus_floor() -> None:
    rows = results.mark_rows([row(seed=0, asr=0.9, floor=0.1), row(seed=1, asr=1.0, floor=0.0)])
    values = cells_of(rows)[0].values
    assert values["lift"] == pytest.approx(0.9)
    assert values["lift_sd"] == pytest.approx(0.02**0.5)


def test_a_failed_attack_is_counted_and_not_averaged() -> None:
    worked = [row(dataset_id="a"), row("abl", dataset_id="a", ba=0.8, asr=0.2)]
    weak = {"attack": "sig", "dataset_id": "b"}
    failed = [row(asr=0.1, **weak), row("abl", ba=0.1, asr=0.0, **weak)]
    unknown = [row("abl", ba=0.2, asr=0.5, attack="lf", dataset_id="c")]
    matrix = matrices_of(cells_of(results.mark_rows(worked + failed + unknown)))[0]
    abl = next(summary for summary in matrix.summaries if summary.defense == "abl")
    assert (abl.counted, abl.left_out) == (1, {"failed": 1, "unproven": 1})
    assert (abl.values["ba"], abl.values["asr"]) == (0.8, 0.2)


def test_defenses_are_ranked_as_the_table_ranks_them() -> None:
    rows = [row(attack=attack, dataset_id=attack) for attack in "ab"]
    for attack in "ab":
        rows += [
            row(name, attack=attack, dataset_id=attack, asr=asr) for name, asr in (("x", 0.1), ("y", 0.3), ("z", 0.2))
        ]
    marked = results.mark_rows(rows)
    text = render(marked, cells_of(marked), NOTHING)
    names = re.findall(r'<tr><th scope="row">(.)</th><td>\w+</td><td>(.*?)</td>', text)
    assert names == [("x", "1.00"), ("z", "2.00"), ("y", "3.00")]
    printed = tables.render_ranking(marked, "der", "markdown")
    assert isinstance(printed, str)
    notes = re.findall(r'<p class="note">((?:ranked|Friedman).*?)</p>', text)
    assert len(notes) == 2
    assert all(note in printed for note in notes)
    alone = [item for item in marked if item["defense"] in ("none", "x")]
    assert 'id="ranks"' not in render(alone, cells_of(alone), NOTHING)


def test_a_cell_says_how_many_of_its_seeds_failed() -> None:
    rows = results.mark_rows([row(seed=0), row(seed=1, asr=0.2), row("abl", seed=0), row("abl", seed=1)])
    cells = {cell.defense: cell for cell in cells_of(rows)}
    assert cells["abl"].notes == ["1/2 failed"]
    assert not cells["abl"].counts
    text = render(rows, list(cells.values()), NOTHING)
    assert text.count('class="cell failed"') == 2
    assert "1/2 failed" in text


def test_undefended_and_reference_columns_come_first_and_presets_are_told_apart() -> None:
    rows = [row("abl"), row("abl", preset="fast"), row("oracle", reads_truth=True), row("none")]
    matrix = matrices_of(cells_of(results.mark_rows(rows)))[0]
    assert matrix.defenses == ("none", "oracle", "abl (fast)", "abl (paper)")
    assert matrix.references == {"oracle"}


def test_each_data_set_and_model_has_a_matrix_of_its_own() -> None:
    rows = results.mark_rows([row(), row(model="wrn-16-1"), row(dataset="cifar10")])
    assert [(it.dataset, it.model) for it in matrices_of(cells_of(rows))] == [
        ("cifar10", "convnet"), ("digits", "convnet"), ("digits", "wrn-16-1"),
    ]  # fmt: skip


def test_names_are_never_read_as_html() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    rows = results.mark_rows([row(attack=evil, dataset=evil, preset=evil, path=evil)])
    text = render(rows, cells_of(rows), NOTHING)
    assert "<img src=x" not in text
    assert text.count("</script>") == 3
    assert data_of(text)["rows"][0]["attack"] == evil


def test_numbers_that_are_not_finite_become_null() -> None:
    assert json.loads(script_json({"a": [float("nan"), 1.5, float("inf")]})) == {"a": [None, 1.5, None]}


def test_a_detection_curve_passes_through_the_rates_of_the_table(grid: Path) -> None:
    rows = results.read_rows([grid])
    runs = describe_runs(rows, Shelf.of([grid]))
    scored = [(item, found) for item, found in zip(rows, runs, strict=True) if found["detection"]]
    assert {item["defense"] for item, _ in scored} == {"abl"}
    for item, found in scored:
        assert len(found["detection"]) == len(FALSE_POSITIVE) <= 200
        for rate, name in ((0.01, "tpr_at_1_fpr"), (0.05, "tpr_at_5_fpr")):
            assert found["detection"][FALSE_POSITIVE.index(rate)] == pytest.approx(item[name], abs=5e-4)


def test_a_run_tells_its_losses_by_phase(grid: Path) -> None:
    rows = results.read_rows([grid])
    shelf = Shelf.of([grid])
    for item, found in zip(rows, describe_runs(rows, shelf), strict=True):
        history = shelf.models[item["model_id"]].history
        assert list(found["history"]) == list(dict.fromkeys(history["phase"]))
        assert sum(len(counts) for _, counts, _ in found["history"].values()) == len(history)
        assert all(len(counts) == len(losses) for _, counts, losses in found["history"].values())
        assert {phase: unit for phase, (unit, _, _) in found["history"].items() if unit == "step"} == (
            {"unlearn": "step"} if item["defense"] == "abl" else {}
        )


def test_a_run_tells_what_would_have_been_isolated_after_each_epoch(grid: Path) -> None:
    rows = results.read_rows([grid])
    for item, found in zip(rows, describe_runs(rows, Shelf.of([grid])), strict=True):
        assert list(found["rounds"]) == (["isolate"] if item["defense"] == "abl" else [])
        for metric, (epochs, values) in found["rounds"].get("isolate", {}).items():
            name = {"precision": "detection_precision", "recall": "detection_recall"}.get(metric, "false_alarms")
            assert epochs == [1, 2]
            assert values[-1] == pytest.approx(item[name], abs=1e-3)


def test_the_commands_of_a_run_make_the_same_artifacts(
    digits: DatasetArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(digits.path, runs / "digits")
    options = {"epochs": 1, "batch_size": 256, "nesterov": False, "milestones": (0.1, 0.5)}
    toy_compiler(monkeypatch)
    told: dict[str, Any] = {"preset": "fast", "options": options, "seed": 7, "compile": True}
    stages.evaluate(stages.defend(runs / "digits", "none", **told).path)
    rows = results.read_rows([runs])
    found = describe_runs(rows, Shelf.of([runs]))[0]
    lines = [shlex.split(line) for line in found["commands"]]
    assert [line[:2] for line in lines] == [["bdbench", "poison"], ["bdbench", "train"], ["bdbench", "evaluate"]]
    assert "--compile" in lines[1]
    assert "--compile" not in lines[2]
    assert ", compiled, " in found["facts"]["device"]
    source = ["--dataset", "digits", "--image-size", "8"]
    assert lines[0][2:] == [*source, "--attack", "badnets", "--trusted", "0.05", "--out", "again/digits"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for line in lines:
        with pytest.raises(SystemExit) as ended:
            run(line[1:])
        assert not ended.value.code
    again = results.read_rows([Path("again")])[0]
    assert again["evaluation_id"] == rows[0]["evaluation_id"]
    assert again["ba"] == rows[0]["ba"]


@pytest.mark.parametrize("name", ATTACK_NAMES)
def test_a_command_names_only_the_options_that_differ_from_the_defaults(name: str) -> None:
    config = {"dataset": "cifar10-1000", "trusted": 0.05, **plain(ATTACKS.load(name).parse({"target": 3}).model_dump())}
    ask = Ask("dataset", name, 1, config, 2, {})
    facts = {"name": "cifar10-1000", "source_options": {"images": 1000}, "given": {"name": "cifar10"}}
    said = commands.poison_command(DatasetArtifact(Path("runs/it"), Manifest(ask.id, ask, {}, facts, {})))
    assert said == (
        f"bdbench poison --dataset cifar10 --images 1000 --attack {name} --trusted 0.05 --seed 2 --target 3 "
        "--out again/it"
    )


def test_a_folder_called_as_a_registered_dataset_is_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "DATA").mkdir()
    toy_file(tmp_path).rename(tmp_path / "DATA" / "cifar10.npz")
    monkeypatch.chdir(tmp_path)
    data = stages.poison("DATA/cifar10.npz", "badnets", source_options={"images": 100}, out=Path("d"))
    assert commands.poison_command(data).startswith("bdbench poison --dataset DATA/cifar10.npz --images 100 --attack")
    monkeypatch.setenv("HOME", str(tmp_path))
    taken = stages.take(tmp_path / "DATA" / "cifar10.npz", out=Path("t"))
    assert shlex.split(commands.poison_command(taken))[:3] == ["bdbench", "take", "~/DATA/cifar10.npz"]


@pytest.mark.parametrize(("name", "said"), [("cifar10", "cifar10 or path/to/cifar10"), ("pets", "path/to/pets")])
def test_a_dataset_of_0_1_is_never_said_to_be_a_registered_one(name: str, said: str) -> None:
    config = {"dataset": name, "trusted": 0.05, **plain(ATTACKS.load("badnets").parse({}).model_dump())}
    ask = Ask("dataset", "badnets", 1, config, 0, {})
    data = DatasetArtifact(Path("runs/it"), Manifest(ask.id, ask, {}, {"name": name, "source_options": {}}, {}))
    assert shlex.split(commands.poison_command(data))[3] == said
    with pytest.raises(DataError, match="no such file or folder"):
        stages.poison(said)


def test_what_is_missing_beside_an_evaluation_is_said_and_nothing_else_is_lost(grid: Path, tmp_path: Path) -> None:
    for path in (path for path in grid.iterdir() if path.name.endswith("-eval")):
        shutil.copytree(path, tmp_path / "runs" / path.name)
    shutil.copytree(grid / "badnets-s0-abl", tmp_path / "runs" / "badnets-s0-abl")
    (tmp_path / "runs" / "badnets-s0-abl" / "history.parquet").write_bytes(b"damaged")
    write_report([tmp_path / "runs"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    data = data_of(text)
    assert len(data["rows"]) == 5
    for item, found in zip(data["rows"], data["runs"], strict=True):
        assert any(item["dataset_id"] in line for line in found["missing"])
        assert not found["commands"]
        if item["defense"] == "abl" and item["seed"] == 0:
            assert any("history.parquet has 7 bytes" in line for line in found["missing"])
        else:
            assert any(item["model_id"] in line for line in found["missing"])
    assert "No picture: the datasets are not here" in text


def test_a_copy_without_images_weights_and_truth_keeps_the_table_the_curves_and_the_commands(
    grid: Path, tmp_path: Path
) -> None:
    heavy = shutil.ignore_patterns("*.safetensors", "predictions.parquet", "truth.parquet")
    shutil.copytree(grid, tmp_path / "light", ignore=heavy)
    light, whole = (results.read_rows([folder]) for folder in (tmp_path / "light", grid))
    assert [item | {"path": ""} for item in light] == [item | {"path": ""} for item in whole]
    write_report([tmp_path / "light"], tmp_path / "page.html")
    told = describe_runs(whole, Shelf.of([grid]))
    for found, expected in zip(data_of((tmp_path / "page.html").read_text())["runs"], told, strict=True):
        assert all(found[part] == expected[part] for part in ("facts", "history", "commands"))
        assert any("truth.parquet" in line for line in found["missing"]) == (expected["detection"] is not None)


@pytest.mark.filterwarnings("default::bdbench.errors.DamageWarning")
def test_the_command_names_a_damaged_artifact_and_shows_the_others(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(grid, tmp_path / "runs")
    (tmp_path / "runs" / "badnets-s0-abl-eval" / "manifest.json").write_text("{")
    usual = warnings.showwarning
    with pytest.raises(SystemExit) as ended:
        run(["table", str(tmp_path / "runs"), "--format", "json"])
    printed = capsys.readouterr()
    assert not ended.value.code
    assert len(json.loads(printed.out)["rows"]) == 4
    assert re.search(r"Warning: passed over: .*badnets-s0-abl-eval/manifest.json is damaged", printed.err)
    assert warnings.showwarning is usual


def test_a_report_of_one_evaluation_finds_what_is_beside_it(grid: Path, tmp_path: Path) -> None:
    write_report([grid / "badnets-s0-abl-eval"], tmp_path / "page.html")
    runs = data_of((tmp_path / "page.html").read_text())["runs"]
    assert [found["missing"] for found in runs] == [[]]


def test_every_attack_has_its_picture(page: Path) -> None:
    text = page.read_text()
    assert text.count('src="data:image/png;base64,') == 6
    assert 'alt="the same with the trigger of blended"' in text


def test_a_hundred_cells_of_three_seeds_stay_under_two_megabytes(grid: Path) -> None:
    real = [item for item in results.read_rows([grid]) if item["attack"] == "badnets"]
    rows = [
        {**real[(seed + place) % len(real)], "attack": f"attack-{place % 10}", "defense": f"defense-{place // 10}"}
        | {"seed": seed, "defense_options": real[-1]["defense_options"]}
        for place in range(100)
        for seed in range(3)
    ]
    cells = cells_of(results.mark_rows(rows))
    assert len(cells) == 100
    size = len(render(rows, cells, Shelf.of([grid])).encode())
    assert size < LIMIT, f"{size:,} bytes"


@pytest.mark.parametrize(
    ("out", "said"), [("folder", "give a file"), ("no/where.html", "is not a folder"), ("x.html", "no evaluation")]
)
def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path, out: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "runs").mkdir()
    with pytest.raises(ArtifactError, match=said):
        write_report([tmp_path / "runs"], tmp_path / out)


def test_the_command_writes_the_page_and_ends_well(
    grid: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["report", str(grid), "--out", str(tmp_path / "r.html"), "--json"])
    assert not ended.value.code
    assert json.loads(capfd.readouterr().out)["evaluations"] == 5
    with pytest.raises(SystemExit) as ended:
        run(["report", str(tmp_path / "nowhere")])
    assert ended.value.code == 1
    assert "not a folder" in capfd.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that notes what its console says and what it asks the network for."""
    pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.set_script_timeout(120)
    yield started
    started.quit()


def until(browser: Any, script: str) -> None:
    """Wait until JavaScript gives something true."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 120).until(lambda it: it.execute_script(f"return {script}"), script)


def resize(browser: Any, width: int, height: int = 900) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_the_page_works_in_a_browser_without_network_and_without_errors(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(selector: str) -> Any:
        return browser.find_element(By.CSS_SELECTOR, selector)

    data = data_of(page.read_text())
    place = next(index for index, cell in enumerate(data["cells"]) if cell["defense"] == "abl")
    resize(browser, 1280)
    browser.get(page.as_uri())
    browser.execute_script("document.querySelector('.charts').scrollIntoView()")
    until(browser, "document.querySelectorAll('.chart svg').length >= 2")
    until(browser, "document.querySelector('[data-chart=detection] .role-legend')")
    named = browser.execute_script("return document.querySelector('[data-chart=detection] .role-legend').textContent")
    assert "abl" in named
    assert "none" not in named  # has no line
    browser.execute_script("scrollTo(0, 0)")

    cell = find(f"[data-cell='{place}']")
    assert f"{data['cells'][place]['asr']:.3f}" in cell.text
    find("input[value=ba] + span").click()
    assert f"{data['cells'][place]['ba']:.3f}" in cell.text

    cell.click()
    assert browser.switch_to.active_element.get_attribute("aria-label") == "Close"
    shown = find("dialog[open]")
    for item in (data["rows"][index] for index in data["cells"][place]["runs"]):
        assert f"{item['asr']:.3f} [{item['asr_low']:.3f}, {item['asr_high']:.3f}]" in shown.text
        assert f"n = {item['asr_n']}" in shown.text
    assert tables.MARKS["b"] in shown.text
    for told in (data["runs"][index] for index in data["cells"][place]["runs"]):
        assert told["commands"][1] in shown.text
        assert told["findings"]["result"] in shown.text
    until(browser, "document.querySelectorAll('dialog .chart svg').length >= 5")
    axes = browser.execute_script(
        "return [...document.querySelectorAll('dialog .losses .role-axis-title')].map((it) => it.textContent)"
    )
    assert [axis for axis in axes if axis != "loss"] == ["epoch", "epoch", "step", "epoch", "share"]
    legend = browser.execute_script("return document.querySelector('dialog .losses figure:last-child').textContent")
    assert all(name in legend for name in ("isolate", "precision", "recall", "false alarms"))
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(browser, "!document.querySelector('dialog').open")
    assert browser.switch_to.active_element == cell

    head = find(".plain thead th:nth-child(4)")
    head.find_element(By.TAG_NAME, "button").click()
    values = "[...document.querySelectorAll('.plain tbody tr')].map((row) => row.cells[3].dataset.sort).filter(Boolean)"
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [float(value) for value in browser.execute_script(f"return {values}")]
    assert rising == sorted(rising)

    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    find("#theme").click()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before

    resize(browser, 390, 844)
    until(browser, "document.documentElement.scrollWidth <= innerWidth")
    cell.click()
    until(browser, "document.querySelector('dialog').scrollWidth <= innerWidth")

    said = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not said
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [it["params"]["request"]["url"] for it in asked if it["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
