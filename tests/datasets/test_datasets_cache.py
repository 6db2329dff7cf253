"""The cache of decoded sources: what is kept, what is checked, and what happens when it cannot be used."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bdbench.data import ImageDataset, SourceData
from bdbench.datasets import cache
from bdbench.datasets.cache import Plan, cache_folder, load_cached
from bdbench.datasets.splits import Splits
from bdbench.errors import DataError
from bdbench.progress import Progress, Silent


class Notes(Silent):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Decoder:
    """Makes a small source of a file's first byte and counts how often it is asked."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.calls = 0

    def __call__(self, progress: Progress) -> Splits:
        self.calls += 1
        progress.note("decoding")
        images = torch.full((4, 1, 8, 8), self.file.read_bytes()[0], dtype=torch.uint8)
        data = ImageDataset(images, torch.tensor([0, 1, 0, 1]), ("a", "b"))
        return Splits(data, data.take(torch.tensor([0, 1])), ["one file left out"], ["a/7.png"])

    def load(self, progress: Progress | None = None, **options: int) -> SourceData:
        plan = Plan("pets", "crop", self.file.parent, (self.file,), options, self)
        return load_cached(plan, progress or Silent())


@pytest.fixture
def decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "images.bin").write_bytes(b"\x07")
    return Decoder(tmp_path / "source" / "images.bin")


def stored() -> list[Path]:
    return sorted(cache_folder().rglob("*.safetensors"))


def test_second_load_reads_the_cache(decoder: Decoder) -> None:
    first, second = decoder.load(), decoder.load()
    assert decoder.calls == 1
    assert first.fingerprint == second.fingerprint
    assert (second.name, second.augment, second.train.class_names) == ("pets", "crop", ("a", "b"))
    assert second.train.images.is_contiguous()


def test_remarks_and_files_left_out_are_told_from_the_cache_too(decoder: Decoder) -> None:
    first, second = decoder.load(), decoder.load()
    assert (first.remarks, first.unreadable) == (("one file left out",), ("a/7.png",))
    assert (second.remarks, second.unreadable) == (first.remarks, first.unreadable)


def test_other_content_other_options_or_another_decoder_is_another_entry(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder.load()
    decoder.load(image_size=16)
    decoder.file.write_bytes(b"\x08")
    assert decoder.load().train.images[0, 0, 0, 0] == 8
    monkeypatch.setattr(cache, "DECODER", cache.DECODER + 1)
    decoder.load()
    assert decoder.calls == len(stored()) == 4


def test_source_moved_elsewhere_is_found_again(decoder: Decoder, tmp_path: Path) -> None:
    decoder.load()
    decoder.file.parent.rename(tmp_path / "moved")
    decoder.file = tmp_path / "moved" / "images.bin"
    decoder.load()
    assert decoder.calls == 1


def change_a_pixel(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garble_the_header(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"class_names", b"class_mames"))


def relabel(file: Path) -> None:
    tensors = load_file(file)
    with cache.safe_open(file, framework="pt") as opened:
        described = opened.metadata()
    save_file({**tensors, "train.labels": 1 - tensors["train.labels"]}, file, described)


def leave_out_the_description(file: Path) -> None:
    save_file(load_file(file), file)


@pytest.mark.parametrize(
    "damage", [change_a_pixel, cut_short, empty, garble_the_header, relabel, leave_out_the_description]
)
def test_damaged_entry_is_rebuilt_with_one_note(decoder: Decoder, damage: Callable[[Path], None]) -> None:
    sound = decoder.load().fingerprint
    damage(stored()[0])
    progress = Notes()
    assert decoder.load(progress).fingerprint == sound
    assert [note for note in progress.notes if note != "decoding"] == [
        f"the cached copy {stored()[0]} is damaged; reading {decoder.file.parent} again"
    ]
    assert decoder.load(progress).fingerprint == sound
    assert decoder.calls == 2


def test_unusable_cache_folder_costs_a_note_not_the_command(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "file"))
    progress = Notes()
    assert len(decoder.load(progress).train) == 4
    assert ["cannot use the cache folder" in note for note in progress.notes] == [True, False]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_full_disk_costs_a_note_and_leaves_no_half_file(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_tensors: object, file: Path, _described: object) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(cache, "save_file", fail)
    progress = Notes()
    assert len(decoder.load(progress).train) == 4
    assert ["could not store" in note for note in progress.notes] == [False, True]
    assert [entry.suffix for entry in (cache_folder() / "decoded").iterdir()] == [".lock"]


def test_what_a_killed_process_left_in_the_cache_is_removed(decoder: Decoder) -> None:
    decoder.load()
    left = stored()[0].with_name(f".{stored()[0].name}.12345")
    stored()[0].rename(left)
    decoder.load()
    assert not left.exists()
    assert stored()


def test_source_that_cannot_be_read_is_named_and_nothing_is_stored(decoder: Decoder) -> None:
    decoder.file.unlink()
    with pytest.raises(DataError, match=r"images\.bin: cannot be read \(No such file"):
        decoder.load()
    assert not stored()


def test_loads_at_once_decode_once(decoder: Decoder) -> None:
    barrier = threading.Barrier(4)

    def load(_: int) -> str:
        barrier.wait()
        return decoder.load().fingerprint

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(load, range(4)))) == 1
    assert decoder.calls == 1


TWO_PROCESSES = """
import sys
from pathlib import Path
from bdbench.datasets import npz
from bdbench.datasets.paths import PathSource
from bdbench.progress import Silent

decode = npz._decode
def said(*arguments):
    print("decoded")
    return decode(*arguments)

npz._decode = said
print(PathSource(path=Path(sys.argv[1])).load(Silent()).fingerprint)
"""


def test_processes_at_once_decode_once_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (2000, 32, 32), np.uint8)
    np.savez_compressed(tmp_path / "set.npz", images=images, labels=np.arange(2000) % 3)
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "set.npz")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0][-1] == printed[1][-1]
    assert sum("decoded" in lines for lines in printed) == 1
    assert len(list((tmp_path / "cache" / "decoded").iterdir())) == 2  # the entry and its lock
