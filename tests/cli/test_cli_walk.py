"""The command line as a user types it: the walk on digits, its errors and its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from toys import FAST, sealed

from bdbench.cli import console
from bdbench.registry import ATTACKS, DEFENSES


def test_the_bare_commands_leave_one_artifact_each_under_runs(walked: Path) -> None:
    names = {path.name for path in (walked / "runs").iterdir()}
    base = "digits-badnets-s0"
    models = {f"{base}-{method}" for method in ("none", "cbd", "abl")}
    assert names == {base, *models, *(f"{name}-eval" for name in models)}


def test_evaluate_gives_a_row_per_model_with_rates_counts_and_intervals(in_walk: Path, bdbench: Any) -> None:
    rows = bdbench("evaluate", "--json").json["rows"]
    assert {row["defense"] for row in rows} == {"none", "cbd", "abl"}
    for row in rows:
        assert row["dataset"] == "digits"
        assert row["attack"] == "badnets"
        assert row["seed"] == 0
        for name in ("ba", "asr", "floor", "ra"):
            assert 0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1
            assert row[f"{name}_n"] > 0


def test_evaluate_says_which_rows_break_an_assertion_and_exits_with_3(in_walk: Path, bdbench: Any) -> None:
    result = bdbench("evaluate", "--assert", "ba<=1.0", "--assert", "asr>1", "--json")
    assert result.code == 3
    assert "asr" in result.err
    assert len(result.json["rows"]) == 3
    assert bdbench("evaluate", "--assert", "ba>=0").code == 0


def test_a_condition_does_not_hold_where_an_evaluation_cannot_be_read(
    in_walk: Path, bdbench: Any, tmp_path: Path
) -> None:
    shutil.copytree("runs", tmp_path / "runs")
    assert bdbench("table", tmp_path, "--assert", "ba>=0").code == 0
    file = tmp_path / "runs" / "digits-badnets-s0-none-eval" / "manifest.json"
    file.write_text(file.read_text()[:-20])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert bdbench("table", tmp_path).code == 0
        result = bdbench("table", tmp_path, "--assert", "ba>=0")
    assert result.code == 1
    assert "digits-badnets-s0-none-eval/manifest.json is damaged" in result.err


def test_a_model_that_is_given_twice_has_one_row(in_walk: Path, bdbench: Any) -> None:
    model = "runs/digits-badnets-s0-none"
    assert len(bdbench("evaluate", model, model, "--json").json["rows"]) == 1


def test_commands_to_go_on_with_can_be_pasted(here: Path, bdbench: Any) -> None:
    assert "bdbench train 'runs/two words'" in bdbench("poison", "--out", "runs/two words").err


def test_conditions_are_written_as_junit(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    assert bdbench("table", "--assert", "ba>=0", "--assert", "asr<=-1", "--junit", str(file)).code == 3
    suite = ET.parse(file).getroot()
    cases = suite.findall("testcase")
    assert int(suite.attrib["tests"]) == len(cases) == 2 * int(suite.attrib["failures"])
    assert all(("failure" in [part.tag for part in case]) == (case.attrib["name"] == "asr<=-1") for case in cases)
    assert "there is none" in bdbench("table", "--junit", str(file)).err


def test_defenses_are_ranked(in_walk: Path, bdbench: Any) -> None:
    shown = bdbench("table", "--ranks", "asr", "--format", "markdown").out
    assert "average rank" in shown
    assert "no test: it needs" in shown
    assert "Did you mean 'asr'" in bdbench("table", "--ranks", "as").err
    only = bdbench("table", "runs/digits-badnets-s0-none-eval", "--ranks", "ba")
    assert (only.code, "nothing to rank: no row is of a defense" in only.err) == (1, True)


def test_a_metric_in_capitals_is_the_metric(in_walk: Path, bdbench: Any) -> None:
    assert bdbench("table", "runs", "--columns", "BA,ASR", "--assert", "BA>=0").code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [("asr=0.1", "form"), ("asrr<=0.1", "Did you mean 'asr'"), ("acc>0.9", "Did you mean 'ba'"), ("ba<=1e", "number")],
)
def test_an_assertion_that_makes_no_sense_is_refused(in_walk: Path, bdbench: Any, text: str, said: str) -> None:
    result = bdbench("evaluate", "--assert", text)
    assert result.code == 2
    assert said in result.err


@pytest.mark.parametrize("style", ["rich", "markdown", "csv", "latex", "json"])
def test_table_prints_every_format(in_walk: Path, bdbench: Any, style: str) -> None:
    result = bdbench("table", "--format", style)
    assert result.code == 0
    assert all(name in result.out for name in ("none", "cbd", "abl"))


def test_metrics_are_chosen_by_name(in_walk: Path, bdbench: Any) -> None:
    shown = bdbench("table", "--columns", "asr, ba_non_target", "--format", "markdown").out
    assert "| ASR | BA, other classes |" in shown
    assert "floor" not in shown
    assert "other" in bdbench("evaluate", "--columns", "ba_non_target").out
    assert "set aside: recall" in bdbench("table", "--wide", "--format", "markdown").out
    refused = bdbench("table", "--columns", "ba,flor")
    assert refused.code == 2
    assert "--columns: unknown metric 'flor'. Did you mean 'floor'? `bdbench list metrics` says" in refused.err
    assert "give one of the two" in bdbench("table", "--columns", "ba", "--wide").err
    assert "drop --columns" in bdbench("table", "--columns", "ba", "--ranks", "der").err


def test_table_writes_a_file(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    assert bdbench("table", "--format", "markdown", "--out", tmp_path / "t.md").code == 0
    assert "| cbd |" in (tmp_path / "t.md").read_text()


@pytest.mark.parametrize("style", ["markdown", "csv", "latex", "json"])
def test_a_table_in_a_file_ends_with_one_line_end(in_walk: Path, bdbench: Any, tmp_path: Path, style: str) -> None:
    assert bdbench("table", "--format", style, "--out", tmp_path / "t").code == 0
    text = (tmp_path / "t").read_text()
    assert text == text.rstrip("\n") + "\n"


def test_two_models_of_one_dataset_are_compared(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    none, cbd = "runs/digits-badnets-s0-none", "runs/digits-badnets-s0-cbd-eval"
    told = bdbench("compare", none, cbd, "--json", "--top", "3").json
    rows = {row["defense"]: row for row in bdbench("table", "--json").json["rows"]}
    for name in ("ba", "asr"):
        assert told["metrics"][name]["a"] == rows["none"][name]
        assert told["metrics"][name]["difference"] == pytest.approx(rows["cbd"][name] - rows["none"][name])
        assert told["metrics"][name]["low"] <= told["metrics"][name]["difference"] <= told["metrics"][name]["high"]
    assert len(told["images"]) == 3
    result = bdbench("compare", none, cbd, "--csv", tmp_path / "d.csv", "--image", tmp_path / "d.png")
    assert "95 % interval" in result.out
    assert len((tmp_path / "d.csv").read_text().splitlines()) == 1 + sum(told["differ"].values())
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    same = bdbench("compare", none, none, "--image", tmp_path / "e.png").err
    assert "nothing to draw" in same
    assert "A and B are the same evaluation" in same
    assert "same evaluation" not in result.err
    assert "is a dataset; compare takes models or evaluations" in bdbench("compare", none, "runs/digits-badnets-s0").err


def test_models_of_two_datasets_are_not_compared(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    assert bdbench("take", "digits", "--images", "200", "--out", tmp_path / "other").code == 0
    assert bdbench("train", tmp_path / "other", *FAST, "--out", tmp_path / "other-none").code == 0
    refused = bdbench("compare", "runs/digits-badnets-s0-none", tmp_path / "other-none")
    assert refused.code == 2
    assert "compare takes two models of one dataset" in refused.err
    assert "digits-200 with none" in refused.err


def test_inspect_counts_roles_and_draws_a_contact_sheet(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    result = bdbench("inspect", "runs/digits-badnets-s0", "--image", tmp_path / "sheet.png")
    assert result.code == 0
    assert "poison" in result.out
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_draws_several_triggers_on_one_image(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    assert bdbench("poison", "--attack", "sig", "--out", tmp_path / "sig").code == 0
    places = ("runs/digits-badnets-s0", tmp_path / "sig")
    result = bdbench("inspect", *places, "--image", tmp_path / "gallery.png")
    assert result.code == 0
    assert result.out.count("trigger: PSNR") == 2
    assert (tmp_path / "gallery.png").read_bytes().startswith(b"\x89PNG")
    assert [found["method"] for found in bdbench("inspect", *places, "--json").json] == ["badnets", "sig"]


def test_inspect_draws_nothing_of_data_sets_with_other_test_images(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    assert bdbench("poison", "--seed", 0, "--test-fraction", 0.3, "--out", tmp_path / "other").code == 0
    result = bdbench("inspect", "runs/digits-badnets-s0", tmp_path / "other", "--image", tmp_path / "x.png")
    assert result.code == 1
    assert "do not have the same test images" in result.err
    mixed = bdbench("inspect", "runs/digits-badnets-s0", "runs/digits-badnets-s0-abl", "--image", tmp_path / "x.png")
    assert mixed.code == 2
    assert "several datasets together, nothing else" in mixed.err
    assert not (tmp_path / "x.png").exists()


def test_inspect_draws_the_loss_curves_of_a_model(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    result = bdbench("inspect", "runs/digits-badnets-s0-abl", "--image", tmp_path / "loss.png")
    assert result.code == 0
    assert "unlearn" in result.out
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_inspect_says_what_was_set_aside_only_where_the_method_decides(in_walk: Path, bdbench: Any) -> None:
    assert "1,366 training samples scored, 68 set aside" in bdbench("inspect", "runs/digits-badnets-s0-abl").out
    scored = bdbench("inspect", "runs/digits-badnets-s0-cbd").out
    assert "1,366 training samples scored" in scored
    assert "set aside" not in scored


def test_inspect_of_an_evaluation_tells_each_epoch_of_isolating(in_walk: Path, bdbench: Any) -> None:
    evaluation = next(Path("runs").glob("*-abl-eval"))
    told = bdbench("inspect", evaluation).out
    assert "What would be set aside after each epoch of isolate" in told
    epochs = bdbench("inspect", evaluation, "--json").json["epochs"]
    assert {row["metric"] for row in epochs} == {"detection_precision", "detection_recall", "false_alarms"}
    for row in epochs:
        assert f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in told


def test_inspect_refuses_a_picture_of_an_unknown_kind(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    result = bdbench("inspect", "runs/digits-badnets-s0", "--image", tmp_path / "sheet.xyz")
    assert result.code == 1
    assert ".png" in result.err


def test_verify_passes_what_is_whole_and_names_what_is_damaged(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    whole = bdbench("verify", "runs", "--json")
    assert (whole.code, len(whole.json)) == (0, len(list(Path("runs").glob("**/manifest.json"))))
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", "runs/digits-badnets-s0-cbd", copy], check=True)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = bdbench("verify", copy, "runs/digits-badnets-s0", "--json")
    assert result.code == 1
    assert [item["ok"] for item in result.json] == [False, True]
    assert "model.safetensors" in result.err
    inside = bdbench("verify", tmp_path, "--json")
    assert (inside.code, [item["artifact"] for item in inside.json]) == (1, [str(copy)])


def test_verify_goes_on_after_a_model_whose_network_is_not_installed(
    in_walk: Path, bdbench: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree("runs/digits-badnets-s0-cbd", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["facts"]["model"] = "netty"
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    result = bdbench("verify", copy, "runs/digits-badnets-s0", "--json")
    assert result.code == 1
    assert [item["ok"] for item in result.json] == [False, True]
    assert "unknown model 'netty'" in result.json[0]["error"]


def test_an_id_works_where_a_path_does(in_walk: Path, bdbench: Any) -> None:
    found = bdbench("inspect", "runs/digits-badnets-s0", "--json").json["id"]
    assert bdbench("inspect", found, "--json").json["id"] == found
    assert bdbench("inspect", "0123456789", "--json").code == 1


def test_the_same_command_again_reuses_the_artifact(in_walk: Path, bdbench: Any) -> None:
    manifest = Path("runs/digits-badnets-s0/manifest.json")
    before = manifest.stat().st_mtime_ns
    for words in (("poison",), ("defend", "--method", "cbd", "--twin-epochs", "1", *FAST)):
        said = bdbench(*words).err
        assert "is there already" in said
        assert "wrote" not in said
        assert "next: bdbench" in said
    assert manifest.stat().st_mtime_ns == before


def test_another_question_for_the_same_place_is_refused_with_what_differs(in_walk: Path, bdbench: Any) -> None:
    result = bdbench("poison", "--rate", "0.2", "--out", "runs/digits-badnets-s0")
    assert result.code == 1
    assert "is another dataset (rate 0.1 -> 0.2)" in result.err
    assert "--out" in result.err.partition("--force")[0]


def test_a_default_name_says_what_differs_from_the_defaults(copy_of_walk: Path, bdbench: Any) -> None:
    size = ("--image-size", "12", "--rate", "0.05")
    made = bdbench("poison", *size, "--json").json
    assert made["path"] == "runs/digits-badnets-s0-image-size12-rate0.05"
    assert "is there already" in bdbench("poison", *size).err
    command = ("defend", "runs/digits-badnets-s0", "--seed", "5", *FAST)
    model = bdbench(*command, "--json").json["path"]
    assert model == "runs/digits-badnets-s0-none-s5-epochs2-batch-size64"
    assert "is there already" in bdbench(*command).err
    shutil.rmtree(made["path"])
    shutil.rmtree(model)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["poison", "--attack", "badnet"], 2, "Did you mean 'badnets'"),
        (["poison", "--dataset", "cifar-10"], 2, "Did you mean 'cifar10'"),
        (["poison", "--dataset", "no/such/folder"], 1, "no/such/folder"),
        (["poison", "--atack", "sig"], 2, "--attack"),
        (["poison", "--rate", "2"], 2, "rate 2.0"),
        (["poison", "--rate", "much"], 2, "number"),
        (
            ["poison", "--alpha", "0.2"],
            2,
            "--alpha belongs to blended, dfst-color, adap-blend, refool and lc (you chose",
        ),
        (["poison", "--no-whole-image"], 2, "poison has no option --no-whole-image. See: bdbench poison --help"),
        (["defend", "--method", "abl", "--twin-epochs", "1"], 2, "--twin-epochs belongs to cbd (you chose abl)"),
        (["train", "--twin-epochs=1"], 2, "--twin-epochs belongs to cbd (train has no defense)"),
        (["defend", "--method", "ac"], 2, "'ac' is a detector, not a defense; try: bdbench scan --method ac"),
        (["defend", "--preset", "huge"], 2, "--preset huge: 'none' has the presets paper, fast, tiny"),
        (["poison", "--out", "runs/digits-badnets-s0", "--target", "10"], 2, "classes are 0..9"),
        (["poison", "--out", "other", "--patch-size", "17"], 2, "16x16"),
        (["poison", "--out", "other", "--rate", "0.0001"], 2, "use at least"),
        (["poison", "--attack", "sig", "--rate", "0.5"], 2, "eligible"),
        (["poison", "--seed", "-1"], 2, "seed"),
        (["defend", "--method", "cdb"], 2, "Did you mean 'cbd'"),
        (["defend", "--method", "cbd", "--twin-epoch", "1"], 2, "--twin-epochs"),
        (["defend", "--method", "cbd", "--twin-epochs", "0"], 2, "twin_epochs 0"),
        (["defend", "--model", "wrn"], 2, "wrn-16-1"),
        (["defend", "--preset", "fats"], 2, "Did you mean 'fast'"),
        (["defend", "--device", "cuda:7"], 1, "--device auto or cpu"),
        (["defend", "--device", "tpu"], 2, "unknown device"),
        (["defend", "--precision", "fp16"], 2, "unknown precision 'fp16'"),
        (["defend", "--augment", "crp"], 2, "Did you mean 'crop'"),
        (["defend", "runs/digits-badnets-s0-none"], 1, "a dataset artifact is needed"),
        (["evaluate", "runs/digits-badnets-s0-cbd-eval"], 1, "a model artifact is needed"),
        (["evaluate", "runs/nothing"], 1, "does not exist"),
        (["table", "nowhere"], 1, "not a folder"),
        (["table", "--format", "html"], 2, "unknown format"),
        (["show", "abll"], 2, "Did you mean 'abl'"),
        (["show", "torchvision:NAME"], 2, "put the name of one in place of NAME"),
        (["defend", "--model", "torchvision:NAME"], 2, "put the name of one in place of NAME"),
        (["poison", "--out", "other", "--trusted", "0.9999"], 2, "trusted 0.9999 leaves none of the 1438 training"),
        (["poison", "--dataset", "cifar10", "--data-root", "no/such"], 1, "--data-root no/such is not a folder"),
        (["inspect", "runs/digits-badnets-s0", "--image", "runs"], 2, "runs is a folder; give a file"),
        (["evaluate", "--assert", "asr<=1", "--junit", "runs/digits-badnets-s0/manifest.json/a.xml"], 2, "cannot make"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_bad_input_gets_a_message_with_the_way_out(
    in_walk: Path, bdbench: Any, arguments: list[str], code: int, said: str
) -> None:
    result = bdbench(*arguments)
    assert result.code == code
    assert said in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err
    assert not list(Path("runs").glob(".*.work"))


def test_the_folder_of_a_file_is_made_before_the_work_for_it(in_walk: Path, bdbench: Any, tmp_path: Path) -> None:
    assert bdbench("table", "--format", "csv", "--out", str(tmp_path / "new" / "table.csv")).code == 0
    assert (tmp_path / "new" / "table.csv").read_text().startswith("attack,")
    assert bdbench("suspects", "runs/nothing", "--csv", str(tmp_path / "other" / "suspects.csv")).code == 1
    assert (tmp_path / "other").is_dir()


def test_a_pickle_offered_as_a_model_is_never_opened(in_walk: Path, bdbench: Any) -> None:
    Path("weights.pth").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    result = bdbench("evaluate", "weights.pth")
    assert result.code == 1
    assert "no pickles" in result.err
    assert not Path("owned").exists()


def test_nothing_to_work_on_names_the_command_that_makes_it(here: Path, bdbench: Any) -> None:
    assert "bdbench poison" in bdbench("train").err
    assert bdbench("evaluate").code == 1


def test_settings_come_from_toml_and_flags_win(here: Path, bdbench: Any) -> None:
    Path("a.toml").write_text('attack = "sig"\nclass_rate = 0.5\ntrusted = 0.0\nseed = 3\n')
    assert bdbench("poison", "--config", "a.toml", "--out", "a", "--delta", "30", "--seed", "4").code == 0
    asked = json.loads(Path("a/manifest.json").read_text())["ask"]
    assert asked["method"] == "sig"
    assert asked["config"]["class_rate"] == 0.5
    assert asked["config"]["delta"] == 30
    assert asked["seed"] == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [("rat = 0.1", "Did you mean 'rate'"), ("rate = =", "line 1"), ("[poison]\nrate = 0.1", "unknown key 'poison'")],
)
def test_a_wrong_toml_file_is_named(here: Path, bdbench: Any, text: str, said: str) -> None:
    Path("a.toml").write_text(text)
    result = bdbench("poison", "--config", "a.toml")
    assert result.code == 2
    assert "a.toml" in result.err
    assert said in result.err


def test_keys_of_a_toml_file_are_the_flags_of_the_command(in_walk: Path, bdbench: Any) -> None:
    Path("a.toml").write_text('format = "csv"\nassert = ["ba>=0", "asr>=2"]\njson = false\n')
    result = bdbench("table", "--config", "a.toml")
    assert result.code == 3
    assert result.out.startswith("attack,attack_options,")
    assert "is not >= 2" in result.err
    assert "is not >= 0" not in result.err
    assert bdbench("table", "--config", "a.toml", "--assert=ba>=0").code == 0


def test_keys_of_a_toml_file_may_have_dashes_and_switches_may_be_off(here: Path, bdbench: Any) -> None:
    Path("a.toml").write_text("test-fraction = 0.3\ndownload = false\nforce = false\ncolour = [1, 2, 3]\n")
    assert bdbench("poison", "--config", "a.toml", "--out", "a").code == 0
    manifest = json.loads(Path("a/manifest.json").read_text())
    assert manifest["facts"]["source_options"] == {"test_fraction": 0.3}
    assert manifest["ask"]["config"]["colour"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("table", 'style = "csv"', "unknown key 'style'"),
        ("table", 'assertions = ["asr<=1"]', "unknown key 'assertions'. Did you mean 'assert'?"),
        ("table", 'places = "runs"', "places is not a flag; give it on the command line"),
        ("train", 'dataset = "runs/x"', "dataset is not a flag; give it on the command line"),
        ("defend", "method = 3", "method must be a name in quotes, not 3"),
        ("poison", "[attack.badnets]\nrate = 0.1", "attack must be a name in quotes, not {'badnets'"),
        ("poison", "seed = [1, 2]", "seed cannot be [1, 2]; --seed takes one value"),
        ("poison", "colour = 7", "colour cannot be 7; --colour takes 3 values"),
        ("poison", "seed = true", "seed cannot be true; --seed takes a value"),
        (
            "poison",
            "alpha = 0.3",
            "alpha belongs to blended, dfst-color, adap-blend, refool and lc (you chose badnets)",
        ),
        ("poison", 'force = "yes"', "force cannot be yes; --force is a switch: true or false"),
        ("poison", "[seed]", "seed is a table"),
    ],
)
def test_a_toml_key_that_is_no_flag_or_has_a_wrong_value_is_named(
    here: Path, bdbench: Any, command: str, text: str, said: str
) -> None:
    Path("a.toml").write_text(text)
    result = bdbench(command, "--config", "a.toml")
    assert result.code == 2
    assert f"a.toml: {said}" in result.err


@pytest.mark.parametrize("kind", ["attacks", "defenses", "datasets", "models", "metrics"])
def test_list_gives_names_and_summaries(bdbench: Any, kind: str) -> None:
    rows = bdbench("list", kind, "--json").json
    assert rows
    assert all(row["name"] and row["summary"] for row in rows)


def test_show_explains_every_name_of_every_registry(bdbench: Any) -> None:
    for rows in bdbench("list", "--json").json.values():
        for row in rows:
            name = row["name"].replace("NAME", "resnet18")
            facts = bdbench("show", name, "--json").json
            assert facts["description"], name
            assert all(option["description"] for option in facts["options"]), name


def test_show_has_room_for_every_flag_on_a_narrow_terminal(bdbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [option["flag"] for option in bdbench("show", "cbd", "--json").json["options"]]
    monkeypatch.setenv("COLUMNS", "80")
    words = bdbench("show", "cbd").out.split()
    assert set(flags) <= set(words)


def test_paragraphs_flow_and_indented_lines_stay() -> None:
    assert console.flowing("One\ntwo.\n\nExamples:\n  a b\n\n  c") == "One two.\n\nExamples:\n  a b\n\n  c"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("bdbench defend --method c", "cbd"),
        ("bdbench defend --method abl --isolation-r", "--isolation-rate"),
        ("bdbench poison --attack b", "badnets"),
        ("bdbench show wr", "wrn-16-1"),
    ],
)
def test_the_shell_completes_names_and_the_flags_of_a_method(line: str, offered: str) -> None:
    words = {"_BDBENCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    program = "import sys; sys.argv[0] = 'bdbench'; from bdbench.__main__ import main; main()"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True, check=False)
    assert offered in done.stdout.split()


def test_help_of_a_method_shows_its_own_flags(bdbench: Any) -> None:
    assert "--unlearn-steps" in bdbench("defend", "--method", "abl", "--help").out
    assert "--unlearn-steps" not in bdbench("defend", "--method", "cbd", "--help").out


FIXED = "quickstart docs take suspects evaluate table compare report sweep status gc inspect verify"
HELPED = [
    *((name,) for name in FIXED.split()),
    *(("poison", "--attack", name) for name in ATTACKS.names()),
    *(("defend", "--method", name) for name in DEFENSES.names()),
]


@pytest.mark.parametrize("words", HELPED, ids=" ".join)
def test_help_cuts_nothing_in_a_terminal_of_eighty_columns(
    words: tuple[str, ...], bdbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = bdbench(*words, "--help")
    assert result.code == 0
    assert "…" not in result.out
    assert "--help" in result.out


def test_a_switch_is_turned_off_and_on_and_a_flag_wins_over_the_file(here: Path, bdbench: Any) -> None:
    def asked(*words: str) -> Any:
        assert bdbench("poison", *words, "--out", "a", "--force").code == 0
        return json.loads((here / "a" / "manifest.json").read_text())["ask"]["config"]["exclude_target"]

    (here / "on.toml").write_text("exclude_target = true\n")
    (here / "off.toml").write_text("exclude_target = false\n")
    assert asked() is False
    assert asked("--exclude-target") is True
    assert asked("--no-exclude-target") is False
    assert asked("--config", "on.toml") is True
    assert asked("--config", "on.toml", "--no-exclude-target") is False
    assert asked("--config", "off.toml", "--exclude-target") is True
    assert "contradict each other" in bdbench("poison", "--exclude-target", "--no-exclude-target").err
    (here / "no.toml").write_text("no_exclude_target = true\n")
    assert "unknown key 'no_exclude_target'" in bdbench("poison", "--config", "no.toml").err


def test_help_starts_without_torch_pandas_and_pyarrow_and_looks_for_no_plugin() -> None:
    code = (
        "import sys\nfrom bdbench.cli.app import run\n"
        "try: run(['--help'])\nexcept SystemExit: pass\n"
        "slow = 'torch', 'pandas', 'pyarrow', 'sklearn', 'pydantic', 'importlib.metadata'\n"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def _start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the program so that Ctrl-C reaches it, also where the tests run in the background of a shell."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from bdbench.__main__ import main; main()"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _wait_for_training(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when the model's hidden folder is there, and a moment has passed."""
    begun = time.monotonic()
    while not list(folder.glob("runs/.*.work/*/")) and process.poll() is None:
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
    time.sleep(0.3)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_blow_in_the_middle_leaves_no_half_artifact_and_the_next_run_ends_well(
    here: Path, bdbench: Any, blow: signal.Signals
) -> None:
    assert bdbench("poison").code == 0
    process = _start(here, "train", "--epochs", "1000")
    try:
        _wait_for_training(here, process)
        process.send_signal(blow)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (-9 if blow == signal.SIGKILL else 130), err
    assert not list(here.glob("runs/digits-badnets-s0-none*"))
    out = "runs/digits-badnets-s0-none-epochs1000"
    assert bdbench("train", *FAST, "--out", out).code == 0
    assert bdbench("verify", out).code == 0
    assert not list(here.glob("runs/.*"))


def test_a_ctrl_c_that_was_swallowed_ends_the_work_at_its_next_step() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with console.live_progress() as progress:
            progress.start("train", 10)
            progress.advance(1)
            with contextlib.suppress(KeyboardInterrupt):  # as an import under C does
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                progress.advance(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_evaluate_takes_a_dataset_for_all_its_models(in_walk: Path, bdbench: Any) -> None:
    rows = bdbench("evaluate", "runs/digits-badnets-s0", "--json").json["rows"]
    assert {"none", "cbd", "abl"} <= {row["defense"] for row in rows}


def test_a_model_is_not_judged_on_a_dataset_of_other_content(copy_of_walk: Path, bdbench: Any) -> None:
    folder = Path("runs/digits-badnets-s0-none")
    raw = json.loads((folder / "manifest.json").read_text())
    raw["facts"]["trained_on"] = "0" * 16
    (folder / "manifest.json").write_text(json.dumps(sealed(raw)))
    result = bdbench("evaluate", folder, "--force")
    assert result.code == 1
    assert "was trained on other images or labels than" in result.err


def test_suspects_takes_the_newest_dataset_and_no_other_ones_answer(copy_of_walk: Path, bdbench: Any) -> None:
    assert bdbench("suspects", "--top", "0").code == 0
    assert bdbench("take", "digits").code == 0
    result = bdbench("suspects")
    assert result.code == 1
    assert "no model or scan of runs/digits, the newest dataset, scored samples" in result.err


def test_help_says_which_presets_have_another_value(bdbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = " ".join(bdbench("defend", "--method", "abl", "--help").out.split())
    assert re.search(r"--isolation-epochs .*?default: 20, presets: .*?fast 3", shown)
