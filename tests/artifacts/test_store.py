"""Artifact folders: what was asked is the name, one rename is the seal, and damage is said exactly."""

# ruff: noqa: PT012 - a block that fails half-way is what is tested
from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from toys import FACTS, MADE, sealed

from bdbench import files
from bdbench.artifacts import finding, manifests, store
from bdbench.artifacts.manifests import Ask
from bdbench.errors import ArtifactError, DamagedError, DamageWarning

ASK = Ask("dataset", "badnets", 1, {"rate": 0.1, "target": 0}, 7, {"source": "abc"})


def seal(path: Path, ask: Ask = ASK, content: str = "content", **made: Any) -> Path:
    with store.create(path, ask) as draft:
        (draft.folder / "data.txt").write_text(content)
        draft.facts |= FACTS[ask.kind]
        draft.made |= MADE | made
    return path


def change_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / manifests.MANIFEST
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def hidden_folders(folder: Path) -> list[str]:
    return [item.name for item in folder.iterdir() if item.name.startswith(".")]


# what an id is


@pytest.mark.parametrize(
    "other",
    [
        replace(ASK, kind="model"),
        replace(ASK, method="sig"),
        replace(ASK, version=2),
        replace(ASK, config={"rate": 0.2, "target": 0}),
        replace(ASK, config={"rate": 0.1}),
        replace(ASK, seed=8),
        replace(ASK, inputs={"source": "abd"}),
    ],
)
def test_another_question_has_another_id(other: Ask) -> None:
    assert other.id != ASK.id


def test_the_order_of_settings_plays_no_part_in_the_id() -> None:
    assert replace(ASK, config={"target": 0, "rate": 0.1}).id == ASK.id


def test_the_id_is_the_same_on_every_machine() -> None:
    assert ASK.id == "1ed431bca135bf84"


def test_hardware_and_time_are_not_part_of_the_id(tmp_path: Path) -> None:
    one = manifests.read_manifest(seal(tmp_path / "one", device="cpu", seconds=1.0))
    other = manifests.read_manifest(seal(tmp_path / "other", device="H200", seconds=9.0))
    assert one.made != other.made
    assert one.id == other.id


# writing


def test_a_sealed_artifact_is_read_back(tmp_path: Path) -> None:
    manifest = manifests.read_manifest(seal(tmp_path / "a", device="cpu"), "dataset")
    assert manifest.ask == ASK
    assert manifest.made == MADE | {"device": "cpu"}
    assert manifest.files["data.txt"]["bytes"] == len("content")
    assert manifests.checked_file(tmp_path / "a", manifest, "data.txt").read_text() == "content"


def test_the_seal_is_a_rename_and_no_copy(tmp_path: Path) -> None:
    with store.create(tmp_path / "a", ASK) as draft:
        folder = draft.folder.stat().st_ino
    assert (tmp_path / "a").stat().st_ino == folder


def test_nothing_is_left_beside_a_sealed_artifact(tmp_path: Path) -> None:
    seal(tmp_path / "a")
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_folders_above_are_made(tmp_path: Path) -> None:
    assert manifests.is_artifact(seal(tmp_path / "runs" / "deep" / "a"))


def test_an_error_while_writing_leaves_no_artifact_and_no_draft(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), store.create(tmp_path / "a", ASK) as draft:
        (draft.folder / "data.txt").write_text("half")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_an_error_while_replacing_leaves_the_old_artifact(tmp_path: Path) -> None:
    seal(tmp_path / "a", content="old")
    with pytest.raises(ZeroDivisionError), store.create(tmp_path / "a", ASK) as draft:
        (draft.folder / "data.txt").write_text("new")
        _ = 1 / 0
    assert (tmp_path / "a" / "data.txt").read_text() == "old"


def test_what_was_there_is_replaced_whole(tmp_path: Path) -> None:
    seal(tmp_path / "a")
    with store.create(tmp_path / "a", ASK) as draft:
        (draft.folder / "other.txt").write_text("new")
    assert sorted(item.name for item in (tmp_path / "a").iterdir()) == ["manifest.json", "other.txt"]


def test_checkpoints_of_an_interrupted_ask_are_found_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), store.create(tmp_path / "a", ASK) as draft:
        (draft.work / "point").write_text("step 5")
        raise KeyboardInterrupt
    with store.create(tmp_path / "a", ASK) as draft:
        assert (draft.work / "point").read_text() == "step 5"
    with store.create(tmp_path / "a", replace(ASK, seed=8)) as draft:
        assert not list(draft.work.iterdir())


def test_another_ask_does_not_take_the_checkpoints_of_an_interrupted_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), store.create(tmp_path / "a", ASK) as draft:
        (draft.work / "point").write_text("step 5")
        raise KeyboardInterrupt
    with store.create(tmp_path / "a", replace(ASK, seed=8)) as draft:
        assert not list(draft.work.iterdir())


def test_two_writers_at_once_are_told_apart(tmp_path: Path) -> None:
    with (
        store.create(tmp_path / "a", ASK),
        pytest.raises(
            ArtifactError,
            match=r"another process is making .*a right now; wait for it, or choose another --out",
        ),
        store.create(tmp_path / "a", ASK),
    ):
        pass
    assert manifests.is_artifact(tmp_path / "a")


def test_two_writers_of_two_places_do_not_meet(tmp_path: Path) -> None:
    with store.create(tmp_path / "a", ASK) as one, store.create(tmp_path / "b", ASK) as other:
        for draft in (one, other):
            draft.facts, draft.made = dict(FACTS["dataset"]), dict(MADE)
    assert len(finding.find_artifacts(tmp_path)) == 2


def test_a_writer_that_comes_as_another_finishes_keeps_its_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first writer gives its lock back and clears up; the second begins in between."""
    second = store.create(tmp_path / "a", ASK)
    release = FileLock.release

    def release_and_let_the_second_in(lock: Any, *args: Any, **kwargs: Any) -> None:
        release(lock, *args, **kwargs)
        monkeypatch.setattr(FileLock, "release", release)
        drafts.append(second.__enter__())

    drafts: list[store.Draft] = []
    with store.create(tmp_path / "a", ASK):
        monkeypatch.setattr(FileLock, "release", release_and_let_the_second_in)
    (drafts[0].folder / "data.txt").write_text("second")
    second.__exit__(None, None, None)
    assert (tmp_path / "a" / "data.txt").read_text() == "second"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/a: .*; choose another --out or make room"):
        seal(tmp_path / "file" / "a")


def test_an_input_that_is_missing_is_named_and_no_other_place_is_advised(tmp_path: Path) -> None:
    message = r"cannot write .*/a: .*No such file or directory: '.*/input\.png'$"
    with pytest.raises(ArtifactError, match=message), store.create(tmp_path / "a", ASK):
        (tmp_path / "input.png").read_bytes()


def test_a_full_disk_is_said_with_the_way_out(tmp_path: Path) -> None:
    message = r"No space left on device; choose another --out or make room$"
    with pytest.raises(ArtifactError, match=message), store.create(tmp_path / "a", ASK):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match=r"cannot write .*Permission denied"):
            seal(tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)


# killed writers

WRITER = """
import json, sys, time
from pathlib import Path
from bdbench.artifacts.store import create
from bdbench.artifacts.manifests import Ask
ask = Ask("dataset", "badnets", 1, {"rate": 0.1, "target": 0}, 7, {"source": "abc"})
path, rounds = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
for _ in range(rounds):
    with create(path, ask) as draft:
        for name in "abc":
            (draft.folder / name).write_bytes(b"x" * 100_000)
        (draft.work / "point").write_text("step 5")
        draft.facts, draft.made = json.loads(sys.argv[3])
        if rounds == 1:
            print("written", flush=True)
            time.sleep(60)
"""

SAID = json.dumps([FACTS["dataset"], MADE])


def start_writer(path: Path, rounds: int, line: str) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(rounds), SAID],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    while writer.stdout.readline().strip() != line:
        assert writer.poll() is None
    return writer


def kill(writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert writer.stdout is not None
    writer.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_writer_killed_before_the_seal_leaves_nothing_that_a_reader_sees(tmp_path: Path) -> None:
    path = tmp_path / "a"
    writer = start_writer(path, 1, "written")
    with pytest.raises(ArtifactError, match="another process is making"):
        seal(path)
    kill(writer)

    assert not path.exists()
    assert finding.find_artifacts(tmp_path) == []
    assert list(tmp_path.glob("**/draft-*"))
    with store.create(path, ASK) as draft:
        assert [item.name for item in draft.folder.parent.glob("draft-*")] == [draft.folder.name]
        assert (draft.work / "point").read_text() == "step 5"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_writer_killed_at_any_time_never_shows_half_an_artifact(tmp_path: Path) -> None:
    for milliseconds in (1, 4, 9, 15):
        path = tmp_path / f"after-{milliseconds}-ms"
        writer = start_writer(path, 1_000_000, "ready")
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        kill(writer)
        if path.exists():
            manifest = manifests.read_manifest(path)
            assert sorted(manifest.files) == ["a", "b", "c"]
            for name in manifest.files:
                manifests.checked_file(path, manifest, name)
        seal(path)
        assert hidden_folders(tmp_path) == []


# reading


def test_a_missing_artifact_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        manifests.read_manifest(tmp_path / "nowhere")


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not an artifact of bdbench: it has no manifest\.json"):
        manifests.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "data.pkl"])
def test_a_pickle_is_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ArtifactError, match="opens no pickles"):
        manifests.read_manifest(tmp_path / name)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a dataset artifact; a model artifact is needed here"):
        manifests.read_manifest(seal(tmp_path / "a"), "model")


def test_a_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    change_manifest(path, lambda raw: raw.update(schema=manifests.SCHEMA + 1))
    with pytest.raises(ArtifactError, match="has schema 2, this bdbench reads 1; upgrade bdbench"):
        manifests.read_manifest(path)


def test_an_older_schema_asks_to_make_it_again(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    change_manifest(path, lambda raw: raw.update(schema=0))
    with pytest.raises(ArtifactError, match="has schema 0, this bdbench reads 1; make the artifact again"):
        manifests.read_manifest(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(id="0" * 16),
        lambda raw: raw["ask"].update(seed=8),
        lambda raw: raw["ask"]["config"].update(rate=0.2),
        lambda raw: raw["ask"].update(method="sig"),
    ],
)
def test_a_changed_ask_no_longer_fits_the_id(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = seal(tmp_path / "a")
    change_manifest(path, change)
    with pytest.raises(ArtifactError, match="was changed: its id does not belong"):
        manifests.read_manifest(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '"text"', '{"schema": "one"}', '{"schema": 1, "ask": 3}', "\x00"]
)
def test_a_damaged_manifest_is_said(tmp_path: Path, text: str) -> None:
    path = seal(tmp_path / "a")
    (path / manifests.MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged .*; make the artifact again"):
        manifests.read_manifest(path)


@pytest.mark.parametrize("part", ["files", "facts", "made"])
@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_manifest_whose_parts_are_no_tables_is_damaged(tmp_path: Path, part: str, value: object) -> None:
    path = seal(tmp_path / "a")
    change_manifest(path, lambda raw: raw.update({part: value}))
    with pytest.raises(ArtifactError, match="is damaged"):
        manifests.read_manifest(path)


@pytest.mark.parametrize("part", ["id", "ask", "files", "facts", "made", "schema"])
def test_a_manifest_without_one_of_its_parts_is_damaged(tmp_path: Path, part: str) -> None:
    path = seal(tmp_path / "a")
    change_manifest(path, lambda raw: raw.pop(part))
    with pytest.raises(ArtifactError, match="is damaged"):
        manifests.read_manifest(path)


def test_a_manifest_that_is_not_text_is_damaged(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    (path / manifests.MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="is damaged"):
        manifests.read_manifest(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    (path / "data.txt").unlink()
    with pytest.raises(ArtifactError, match=r"data\.txt is missing; make the artifact again"):
        manifests.checked_file(path, manifests.read_manifest(path), "data.txt")


@pytest.mark.parametrize("text", ["", "conten", "contents"])
def test_a_file_of_another_length_is_said_with_both_sizes(tmp_path: Path, text: str) -> None:
    path = seal(tmp_path / "a")
    (path / "data.txt").write_text(text)
    with pytest.raises(ArtifactError, match=rf"data\.txt has {len(text)} bytes, its manifest says 7"):
        manifests.checked_file(path, manifests.read_manifest(path), "data.txt")


def test_a_flipped_byte_is_said(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    (path / "data.txt").write_text("Content")
    with pytest.raises(ArtifactError, match=r"data\.txt was changed: its SHA-256 is not the manifest's"):
        manifests.checked_file(path, manifests.read_manifest(path), "data.txt")


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    (path / "extra.txt").write_text("extra")
    with pytest.raises(DamagedError, match=r"has no extra\.txt"):
        manifests.checked_file(path, manifests.read_manifest(path), "extra.txt")


# reuse


def test_an_equal_artifact_is_there_unless_forced(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    assert store.existing(path, ASK, force=False)
    assert not store.existing(path, ASK, force=True)


@pytest.mark.parametrize("content", [None, "cont"])
def test_an_artifact_that_lacks_a_file_or_a_part_has_to_be_made_again(tmp_path: Path, content: str | None) -> None:
    file = seal(tmp_path / "a") / "data.txt"
    file.unlink() if content is None else file.write_text(content)
    with pytest.warns(DamageWarning, match=r"a is made again: data.txt missing or cut short"):
        assert not store.existing(tmp_path / "a", ASK, force=False)


def test_an_empty_place_holds_nothing(tmp_path: Path) -> None:
    assert not store.existing(tmp_path / "a", ASK, force=False)


def test_another_artifact_in_the_way_is_told_by_what_differs(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    other = replace(ASK, seed=8, config={"rate": 0.2, "target": 0}, inputs={"source": "fedcba"})
    said = r"a is another dataset \(seed 7 -> 8, rate 0.1 -> 0.2, other images\); give another --out, or no --out: .* "
    with pytest.raises(ArtifactError, match=f"{said}--force replaces it"):
        store.existing(path, other, force=False)
    assert not store.existing(path, other, force=True)


def test_other_images_are_told_by_the_options_that_chose_them(tmp_path: Path) -> None:
    with store.create(tmp_path / "a", ASK) as draft:
        draft.facts |= FACTS[ASK.kind] | {"source_options": {"image_size": 16}}
        draft.made |= MADE
    other = replace(ASK, inputs={"source": "fedcba"})
    for options, said in (
        ({"image_size": 32}, "(image_size 16 -> 32)"), ({}, "(image_size 16 -> none)"),
        ({"image_size": 16}, "(other images)"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=re.escape(said)):
            store.existing(tmp_path / "a", other, force=False, facts={"source_options": options})


def test_force_does_not_replace_an_artifact_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is a dataset artifact .*, no model; choose another --out"):
        store.existing(seal(tmp_path / "a"), replace(ASK, kind="model"), force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_or_file_of_the_user_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    for name in ("folder", "file"):
        with pytest.raises(ArtifactError, match="exists and is not an artifact of bdbench; choose another --out"):
            store.existing(tmp_path / name, ASK, force=force)


@pytest.mark.parametrize("part", ["files", "facts", "made"])
def test_a_manifest_that_says_something_else_than_was_written_is_refused(tmp_path: Path, part: str) -> None:
    """A table believes the facts of an evaluation: its defense, its preset, its marks."""
    file = seal(tmp_path / "it") / manifests.MANIFEST
    manifests.read_manifest(tmp_path / "it")
    described = json.loads(file.read_text())
    described[part]["more"] = {"sha256": "0" * 64, "bytes": 1}
    file.write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="was changed: it does not say any more what was written"):
        manifests.read_manifest(tmp_path / "it")
    file.write_text(json.dumps({key: value for key, value in described.items() if key != "seal"}))
    with pytest.raises(ArtifactError, match="was changed: it does not say any more what was written"):
        manifests.read_manifest(tmp_path / "it")
    file.write_text(json.dumps(sealed(described)))
    manifests.read_manifest(tmp_path / "it")


# finding


def test_artifacts_are_listed_by_kind_and_oldest_first(tmp_path: Path) -> None:
    model = replace(ASK, kind="model")
    for age, (name, ask) in enumerate([("c", ASK), ("b", model), ("a", ASK)]):
        file = seal(tmp_path / name, ask) / manifests.MANIFEST
        os.utime(file, ns=(age * 10**9, age * 10**9))
    assert [path.name for path, _ in finding.find_artifacts(tmp_path)] == ["c", "b", "a"]
    assert [path.name for path, _ in finding.find_artifacts(tmp_path, "model")] == ["b"]


def test_a_copy_is_listed_in_the_order_in_which_things_were_made(tmp_path: Path) -> None:
    """Tables choose the newest: files that were copied, unpacked or checked out have times of their own."""
    for age, name in enumerate(["c", "b", "a"]):
        file = seal(tmp_path / name) / manifests.MANIFEST
        described = json.loads(file.read_text())
        described["made"]["at"] = f"2026-01-0{age + 1}T00:00:00+00:00"
        file.write_text(json.dumps(sealed(described)))
        os.utime(file, ns=(10**9, (9 - age) * 10**9))
    assert [path.name for path, _ in finding.find_artifacts(tmp_path)] == ["c", "b", "a"]


def test_damaged_and_unfinished_artifacts_are_passed_over(tmp_path: Path) -> None:
    seal(tmp_path / "good")
    (seal(tmp_path / "bad") / manifests.MANIFEST).write_text("{")
    seal(tmp_path / ".hidden.work" / "draft")
    with pytest.warns(DamageWarning, match=r"passed over: .*bad/manifest.json is damaged .*--force"):
        assert [path.name for path, _ in finding.find_artifacts(tmp_path)] == ["good"]


def test_an_artifact_is_located_by_path_or_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    assert finding.locate(path, "dataset", tmp_path) == path
    assert finding.locate(ASK.id, "dataset", tmp_path) == path
    assert finding.locate(ASK.id[:6], "dataset", tmp_path) == path


def test_an_id_of_another_kind_is_not_found(tmp_path: Path) -> None:
    seal(tmp_path / "a")
    with pytest.raises(ArtifactError, match=f"{ASK.id} does not exist, and no model artifact under"):
        finding.locate(ASK.id, "model", tmp_path)


def test_a_path_that_is_no_id_is_reported_as_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="runs/typo does not exist"):
        finding.locate("runs/typo", "dataset", tmp_path)


def test_the_newest_of_equal_artifacts_is_located(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "old"]):
        file = seal(tmp_path / name) / manifests.MANIFEST
        os.utime(file, ns=((2 - age) * 10**9, (2 - age) * 10**9))
    assert finding.locate(ASK.id, "dataset", tmp_path).name == "new"


# single files


def test_a_file_is_replaced_by_one_rename(tmp_path: Path) -> None:
    file = tmp_path / "point"
    file.write_text("old")
    with files.replace_file(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["point"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "point"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replace_file(file) as temporary:
        temporary.write_text("new")
        _ = 1 / 0
    assert file.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["point"]


@pytest.mark.parametrize("name", ["point", "[x]" * 60, os.fsdecode(b"\xff")])
def test_what_a_killed_process_left_of_a_file_is_removed_and_no_other_file(tmp_path: Path, name: str) -> None:
    file, other = tmp_path / name, tmp_path / f"{name}2"
    for path in (file, other):
        with pytest.raises(ZeroDivisionError), files.replace_file(path) as temporary:
            _ = 1 / 0
        temporary.touch()  # as SIGKILL leaves it
        temporary.with_suffix("").touch()  # a file of the user's
    files.remove_unfinished(file)
    assert list(tmp_path.glob(".*.tmp")) == [temporary]
    files.remove_unfinished(other)
    assert [path.suffix == ".tmp" for path in tmp_path.iterdir()] == [False, False]


# replaced without a gap


def test_a_replaced_artifact_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal(tmp_path / "a")
    seen = []
    swap = files.exchange

    def watched(one: Path, other: Path) -> bool:
        done = swap(one, other)
        seen.append((done, manifests.is_artifact(other)))
        return done

    monkeypatch.setattr(store, "exchange", watched)
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("there would be a moment without it"))
    with contextlib.suppress(pytest.fail.Exception):  # clearing up renames the hidden folder
        seal(tmp_path / "a", replace(ASK, seed=8))
    assert seen == [(True, True)]
    assert manifests.read_manifest(tmp_path / "a").ask.seed == 8


def test_where_names_cannot_be_exchanged_what_was_taken_away_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal(tmp_path / "a")
    monkeypatch.setattr(store, "exchange", lambda *_: False)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if Path(target) == tmp_path / "a":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        seal(tmp_path / "a", replace(ASK, seed=8))
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ZeroDivisionError), store.create(tmp_path / "a", replace(ASK, seed=9)):
        assert manifests.read_manifest(tmp_path / "a").ask == ASK
        raise ZeroDivisionError
    assert manifests.read_manifest(tmp_path / "a").ask == ASK


def test_a_file_of_the_users_in_an_artifact_is_not_lost(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"files that are not of the artifact .*notes\.txt"):
        store.existing(path, replace(ASK, seed=8), force=True)
    assert finding.unneeded(tmp_path) == []


def test_a_hidden_folder_of_the_users_is_no_leftover_and_not_written_into(tmp_path: Path) -> None:
    mine = tmp_path / ".a.work"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    assert finding.unneeded(tmp_path) == []
    with pytest.raises(ArtifactError, match=r"\.a\.work is in the way"):
        seal(tmp_path / "a")
    assert (mine / "thesis.tex").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="no shared locks")
def test_what_is_being_read_is_not_removed(tmp_path: Path) -> None:
    path = seal(tmp_path / "a")
    with store.held(path):
        assert finding.unneeded(tmp_path) == []
        assert not finding.remove(path)
    assert finding.unneeded(tmp_path) == [path]
    assert finding.remove(path)
    assert list(tmp_path.iterdir()) == []


def test_a_removal_that_is_killed_leaves_what_the_next_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = seal(tmp_path / "a")
    monkeypatch.setattr(finding.shutil, "rmtree", lambda *_, **__: None)
    assert finding.remove(path)
    monkeypatch.undo()
    (left,) = finding.unneeded(tmp_path)
    assert finding.remove(left)
    assert list(tmp_path.iterdir()) == []


# the form of a manifest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["files"].update({"../../secret": {"sha256": "0" * 64, "bytes": 1}}), "names no file"),
        (lambda raw: raw["files"]["data.txt"].update(bytes=-1), "greater than or equal to 0"),
        (lambda raw: raw["files"]["data.txt"].update(sha256="x"), "sha256"),
        (lambda raw: raw["facts"].pop("name"), "facts.name"),
        (lambda raw: raw["facts"].update(image_shape=[3, 3000000, 3000]), "larger than"),
        (lambda raw: raw["facts"].update(image_shape=[3, 0, 8]), "image_shape"),
        (lambda raw: raw["facts"]["counts"].update(train="many"), "facts.counts.train"),
        (lambda raw: raw["facts"].update(class_names=[]), "class_names"),
        (lambda raw: raw["made"].update(seconds=float("nan")), "made.seconds"),
        (lambda raw: raw["made"].pop("at"), "made.at"),
        (lambda raw: raw["ask"].update(config=[]), "ask.config"),
        (lambda raw: raw.update(more=1), "more"),
    ],
)
def test_a_manifest_of_another_form_is_damage_that_names_the_place(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    path = seal(tmp_path / "a")
    change_manifest(path, change)
    raw = json.loads((path / manifests.MANIFEST).read_text())
    if set(raw) == {"id", "ask", "files", "facts", "made", "schema", "seal"} and isinstance(raw["ask"]["config"], dict):
        (path / manifests.MANIFEST).write_text(json.dumps(sealed(raw)))
    with pytest.raises(DamagedError, match=said) as caught:
        manifests.read_manifest(path)
    assert caught.value.path == path


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 50_000, "9" * 100_000, "[]", "3", '"x"', "null"])
def test_a_manifest_that_is_something_else_is_damage(tmp_path: Path, content: str) -> None:
    path = seal(tmp_path / "a")
    (path / manifests.MANIFEST).write_text(content)
    with pytest.raises(DamagedError, match="is damaged"):
        manifests.read_manifest(path)
