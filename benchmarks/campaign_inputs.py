"""Campaign over datasets and pictures that somebody prepared."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from campaign_running import TEXTS, Case, Verdict, damage, run
from PIL import Image


def case(case: Case) -> Verdict:
    """Take, or poison, a dataset that somebody prepared; what is written has to verify."""
    rng = case.rng
    makers = {"folder": _folder, "npz": _npz, "parquet": _parquet, "picture": _picture}
    kind = rng.choice(["folder", "folder", "npz", "parquet", "picture"])
    told, path = makers[kind](rng)
    what = f"{kind}, {told}"
    if kind == "picture":
        words = [
            "poison",
            "--attack",
            rng.choice(["blended", "adap-blend"]),
            "--picture",
            path,
            "--images",
            "100",
            "--out",
            "out",
        ]
    else:
        sized = rng.choice([[], ["--image-size", "12"], ["--skip-unreadable"], ["--test-fraction", "0.5"]])
        words = [*rng.choice([["take", path], ["poison", "--dataset", path]]), "--out", "out", *sized]
    ended = run(words)
    if ended.problem or Path("PWNED").exists():
        return Verdict(what, ended.problem or "code ran", ended.out + ended.err)
    if ended.code and Path("out").exists():
        return Verdict(what, "an artifact stands after an error", ended.err)
    for more in ("verify out", "inspect out", "inspect out --image x.png") if not ended.code else ():
        looked = run(more.split())
        if looked.problem or looked.code:
            return Verdict(f"{what}; {more}", looked.problem or f"exit code {looked.code}", looked.err)
    return Verdict(what, "")


def _pixels(rng: random.Random, side: int = 12) -> np.ndarray:
    return np.frombuffer(rng.randbytes(side * side * 3), np.uint8).reshape(side, side, 3)


def _encoded(rng: random.Random) -> tuple[str, bytes]:
    """Return a name with its suffix, and an image that is damaged or odd."""
    suffix, file_format = rng.choice(
        [
            ("png", "PNG"),
            ("jpg", "JPEG"),
            ("bmp", "BMP"),
            ("gif", "GIF"),
            ("tif", "TIFF"),
            ("webp", "WEBP"),
            ("ppm", "PPM"),
            ("jp2", "JPEG2000"),
        ]
    )
    kind = rng.choice(["damaged", "damaged", "damaged", "mode", "eps", "svg", "bomb", "text", "empty"])
    stream = io.BytesIO()
    image = Image.fromarray(_pixels(rng))
    if kind == "mode":
        image, file_format, suffix = (
            image.convert(rng.choice(["1", "L", "LA", "P", "RGBA", "I", "F", "CMYK"])),
            "TIFF",
            "tif",
        )
    image.save(stream, file_format)
    content = stream.getvalue()
    if kind == "damaged":
        content = damage(content, rng)
    elif kind == "eps":
        content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n(PWNED) (w) file closefile\n"
    elif kind == "svg":
        content = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    elif kind in ("bomb", "text"):
        side = rng.choice([10_000, 11_000, 100_000, 2**31 - 1]) if kind == "bomb" else 12
        body = b"a\0\0" + zlib.compress(b"A" * 10**7)
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
            (b"zTXt", body),
            (b"IDAT", zlib.compress(b"")),
        ]
        packed = [
            struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
            for name, part in chunks
        ]
        suffix, content = "png", b"\x89PNG\r\n\x1a\n" + b"".join(packed)
    elif kind == "empty":
        content = b""
    return f"{kind}.{rng.choice([suffix, 'png'])}", content


def _folder(rng: random.Random) -> tuple[str, str]:
    names = rng.choice(
        [
            ["a", "b"],
            ["a", "[/b]"],
            ["\x1b[31m", "=1+1"],
            ["train", "test"],
            ["\u202ea", "<b>"],
            ["a", os.fsdecode(b"\xff")],
        ]
    )
    for name in names:
        (Path("set") / name).mkdir(parents=True)
        for row in range(8):
            Image.fromarray(_pixels(rng)).save(Path("set") / name / f"{row}.png")
    told = []
    for row in range(rng.choice([0, 1, 1, 4])):
        name, content = _encoded(rng)
        (Path("set") / names[0] / f"{row}{name}").write_bytes(content)
        told.append(name)
    odd = Path("set") / names[1] / "odd.png"
    thing = rng.choice(["", "", "link", "loop", "pipe", "device"])
    if thing == "pipe":
        os.mkfifo(odd)
    elif thing:
        odd.symlink_to({"link": "/etc/passwd", "loop": "odd.png", "device": "/dev/zero"}[thing])
    return f"{names!r} {told} {thing}", "set"


def _npz(rng: random.Random) -> tuple[str, str]:
    images, labels = np.stack([_pixels(rng) for _ in range(40)]), np.arange(40) % 4
    kind = rng.choice(["damaged", "damaged", "header", "type", "labels", "pickle", "names", "packed"])
    arrays: dict[str, Any] = {"images": images, "labels": labels}
    if kind == "type":
        arrays["images"] = images.astype(rng.choice(["f4", "i1", "u2", "bool", "c8", "S1", "U1", "M8[s]"]))
    elif kind == "labels":
        arrays["labels"] = rng.choice(
            [labels - 1, labels * 10**5, labels / 2, labels[None], np.array(5), labels[:0], np.array(TEXTS[:40])]
        )
    elif kind == "pickle":
        arrays["labels"] = np.array([_Runs()] * 40, object)
    elif kind == "names":
        arrays = {rng.choice(["images", "../x", "a\x1b[31m"]): images, "y": labels}
    np.savez(*["set.npz"], **arrays) if kind != "packed" else np.savez_compressed(
        "set.npz", images=np.zeros((10**5, 28, 28), np.uint8), labels=np.arange(10**5) % 3
    )
    if kind == "damaged":
        Path("set.npz").write_bytes(damage(Path("set.npz").read_bytes(), rng))
    elif kind == "header":
        said = rng.choice(["((((", "{", "(" * 5000, "__import__('os').system('touch PWNED')", "9" * 9000, *[
        ]])  # fmt: skip
        with zipfile.ZipFile("set.npz", "w") as archive:
            for name in arrays:
                archive.writestr(
                    f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(said)) + said.encode() + bytes(17280)
                )
        return f"{kind} {said[:50]!r}", "set.npz"
    return kind, "set.npz"


class _Runs:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch PWNED",)


def _parquet(rng: random.Random) -> tuple[str, str]:
    stream = io.BytesIO()
    Image.fromarray(_pixels(rng)).save(stream, "PNG")
    images: Any = pa.array([{"bytes": stream.getvalue(), "path": "/etc/passwd"}] * 40)
    labels: Any = pa.array([0, 1, 2, 3] * 10)
    kind = rng.choice(["damaged", "damaged", "image", "strings", "labels", "twice", "names", "shared"])
    if kind == "image":
        images = pa.array([_encoded(rng)[1] for _ in range(40)])
    elif kind == "strings":
        secret = str(Path("secret.png").resolve())
        Path("secret.png").write_bytes(stream.getvalue())
        images = rng.choice(
            [
                pa.array([{"bytes": secret}] * 40),
                pa.array([secret] * 40),
                pa.array([{"path": secret}] * 40),
                pa.array([1] * 40),
            ]
        )
    elif kind == "labels":
        texts = [text.replace("\ud800", "s") for text in rng.choices(TEXTS, k=40)]
        labels = rng.choice(
            [
                pa.array(texts),
                pa.array([2**63] * 40, pa.uint64()),
                pa.nulls(40),
                pa.array([[1]] * 40),
                pa.array([0.5] * 40),
                pa.array([-1] * 40),
            ]
        )
    elif kind == "shared":  # a few bytes that many rows stand for
        size, rows = rng.choice([1000, 3_000_000]), pa.array([0] * 40, pa.int32())
        images = pa.DictionaryArray.from_arrays(rows, pa.array([stream.getvalue() + bytes(size)], pa.binary()))
        if rng.random() < 0.5:
            images, labels = pa.chunked_array([images] * 5), pa.array([0, 1, 2, 3] * 50)
    columns, names = [images, labels], ["image", "label"]
    if kind == "twice":
        columns, names = [images, labels, images, labels], ["image", "label", "image", "label"]
    table = pa.table(columns, names=names)
    if kind == "names":
        said = rng.choice(
            [["\x1b[31m", "[/b]", "=1", "<b>"], [1] * 4, ["x"] * 200_000, None, [["x"]] * 4, [10**300] * 4]
        )
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": {"label": {"names": said}}}})}
        )
    stored = kind != "shared"
    pq.write_table(table, "set.parquet", row_group_size=rng.choice([7, 1000]), store_schema=stored)
    if kind == "damaged":
        Path("set.parquet").write_bytes(damage(Path("set.parquet").read_bytes(), rng))
    return kind, "set.parquet"


def _picture(rng: random.Random) -> tuple[str, str]:
    name, content = _encoded(rng)
    path = rng.choice([f"p-{name}"] * 9 + ["/dev/zero", "/dev/stdin", "nothing.png"])
    if not path.startswith("/") and path != "nothing.png":
        Path(path).write_bytes(content)
    return f"picture {path}", path
