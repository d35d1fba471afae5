"""What a folder or manifest holds: each image, row and caption is scored or named, and once."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from PIL import Image

from benchmarks.evaluation.scoring.items import Source, read_source
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError

NFC, NFD = "caf\u00e9", "cafe\u0301"


def picture(path: Path, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, kind)
    return path


def captioned(path: Path, caption: str, kind: str = "PNG") -> Path:
    picture(path, kind).with_suffix(".txt").write_text(caption)
    return path


def read(path: Path, prompts: list[Prompt] | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """The prompts of the items by name, and what is bad."""
    source = read_source(path, prompts)
    return {item.name: item.prompt for item in source.items}, dict(source.bad)


# --- files of a folder ---------------------------------------------------------------------------


def test_images_of_any_suffix_are_scored_where_a_caption_names_them(tmp_path: Path) -> None:
    kinds = {"0.jp2": "JPEG2000", "1.tga": "TGA", "2.pgm": "PPM", "3.apng": "PNG", "4": "PNG"}
    kinds |= {"v1.5_6": "PNG", "v1.a": "PNG", "v1.b": "PNG", "7.image": "PNG", "8.JPE": "JPEG"}
    for name, kind in kinds.items():
        picture(tmp_path / "image", kind).rename(tmp_path / name)
    stems = {name: name if name.startswith("v") else name.split(".")[0] for name in kinds}
    for stem in stems.values():
        (tmp_path / f"{stem}.txt").write_text(f"about {stem}")
    for name in ("0.json", "1.npz", "notes.md", "README.txt", "other"):
        (tmp_path / name).write_text('{"seed": 1}')
    found, bad = read(tmp_path)
    assert found == {name: f"about {stem}" for name, stem in stems.items()}
    assert bad == {}
    prompts = [Prompt(stem, f"prompt {stem}") for stem in stems.values()]
    found, bad = read(tmp_path, prompts)
    assert found == {name: f"prompt {stem}" for name, stem in stems.items()}
    assert bad == {}


def test_captions_are_scored_or_named(tmp_path: Path) -> None:
    captioned(tmp_path / "0.png", "zero")
    picture(tmp_path / "1.png")
    (tmp_path / "1.png.txt").write_text("one")
    picture(tmp_path / "2.png")
    (tmp_path / "2.TXT").write_text("two", encoding="utf-16")
    for name in ("3.txt", "3.png.txt"):
        (tmp_path / name).write_text("three")
    picture(tmp_path / "3.png")
    (tmp_path / "4.txt").write_text("four")
    (tmp_path / "5.txt").write_text("five")
    (tmp_path / "5").write_bytes(b"no image")
    captioned(tmp_path / "6.png", "six").rename(tmp_path / "6.heic")
    found, bad = read(tmp_path)
    assert found == {"0.png": "zero", "1.png": "one", "2.png": "two"}
    assert bad == {
        "3": "has two captions, 3.png.txt and 3.txt; remove one",
        "4.txt": "caption without a readable image",
        "5.txt": "caption without a readable image",
        "6.heic": "unsupported image format; convert it to PNG",
    }


def test_linked_folders_are_entered_once_and_cycles_end(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    captioned(folder / "0.png", "zero")
    captioned(folder / "own" / "1.png", "one")
    captioned(elsewhere / "deep" / "2.png", "two")
    captioned(tmp_path / "not-below.png", "never")
    for name, target in (
        ("a-link-to-own", folder / "own"),
        ("part2", elsewhere),
        ("part3", elsewhere),
        ("part4", elsewhere / "deep"),
        ("self", folder),
        ("above", tmp_path),
        ("own/up", folder),
    ):
        (folder / name).symlink_to(target, target_is_directory=True)
    (elsewhere / "back").symlink_to(elsewhere)
    (elsewhere / "deep" / "round").symlink_to(folder)
    (elsewhere / "above").symlink_to(tmp_path)
    (folder / "gone").symlink_to(tmp_path / "absent")
    (folder / "loop.png").symlink_to("loop.png")
    found, bad = read(folder)
    assert found == {"0.png": "zero", "own/1.png": "one", "part2/deep/2.png": "two"}
    assert bad.keys() == {"gone", "loop.png"}
    assert bad["gone"] == f"broken link to {tmp_path / 'absent'}"
    manifest = folder / "manifest.csv"
    manifest.write_text("image,prompt\npart3/deep/2.png,two\nown/1.png,one\nloop.png,loop\n")
    found, bad = read(folder)
    assert found.keys() == {"part3/deep/2.png", "own/1.png"}
    assert bad.keys() == {"0", "gone", "loop.png", "loop"}


def test_a_link_to_another_image_counts_for_another_prompt_only(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    captioned(folder / "0.png", "zero")
    for name, caption in (("same", "zero"), ("other", "another"), ("latest", None)):
        (folder / f"{name}.png").symlink_to("0.png")
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption)
    # Content stores hold equal images once; each name is an image of its own.
    blob = picture(tmp_path / "blob")
    for name in ("2", "3"):
        (folder / f"{name}.png").symlink_to(blob)
        (folder / f"{name}.txt").write_text("stored")
    found, bad = read(folder)
    stored = {"2.png": "stored", "3.png": "stored"}
    assert found == {"0.png": "zero", "other.png": "another", **stored}
    assert bad == {}
    prompts = [Prompt(name, name) for name in ("0", "other", "2", "3")]
    assert read(folder, prompts)[0].keys() == found.keys()
    (folder / "0_1.png").symlink_to("0.png")
    assert read(folder, prompts)[0].keys() == found.keys()


def test_names_match_in_either_normal_form(tmp_path: Path) -> None:
    captioned(tmp_path / "a" / f"{NFD}.png", "by caption")
    (tmp_path / "a" / f"{NFD}.txt").rename(tmp_path / "a" / f"{NFC}.txt")
    assert read(tmp_path / "a")[0] == {f"{NFD}.png": "by caption"}
    picture(tmp_path / "b" / f"{NFD}_1.png")
    assert read(tmp_path / "b", [Prompt(NFC, "by id")])[0] == {f"{NFD}_1.png": "by id"}
    for place, name in enumerate((f"{NFD}/0.png", f"{NFD}/{NFC}.png")):
        picture(tmp_path / "c" / str(place) / name)
        named = normalize("NFC", name)
        (tmp_path / "c" / str(place) / "m.csv").write_text(f"image,prompt\n{named},by path\n")
        assert read(tmp_path / "c" / str(place) / "m.csv")[0] == {named: "by path"}
    for name in (NFC, NFD):  # two files stay two
        captioned(tmp_path / "d" / f"{name}.png", f"{len(name)} characters")
    both = {f"{NFC}.png": "4 characters", f"{NFD}.png": "5 characters"}
    assert read(tmp_path / "d")[0] == both
    prompts = [Prompt(NFC, "4 characters"), Prompt(NFD, "5 characters")]
    assert read(tmp_path / "d", prompts)[0] == both


def test_names_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioned(tmp_path / "x.png", "x")
    for suffix in (".png", ".txt"):
        (tmp_path / f"x{suffix}").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9") + suffix)
    assert read(tmp_path)[1] == {r"'caf\udce9.png'": "path is not UTF-8; rename the file or folder"}
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    (reason,) = read(tmp_path)[1].values()
    assert reason == "file names are decoded as ascii; set LC_ALL=C.UTF-8"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    captioned(tmp_path / "0.png", "zero")
    captioned(tmp_path / "closed" / "1.png", "one")
    (tmp_path / "closed").chmod(0)
    try:
        assert read(tmp_path)[1] == {"closed": "cannot be read (Permission denied)"}
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    captioned(tmp_path / "0.png", "zero")
    os.mkfifo(tmp_path / "1.png")
    assert read(tmp_path)[1] == {"1.png": "not a regular file"}


# --- manifests -----------------------------------------------------------------------------------


def manifest(folder: Path, name: str, text: str | bytes) -> Path:
    for image in ("0.png", "1.png"):
        picture(folder / image)
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "image,prompt\r\n0.png,a cat\r\n1.png,a dog\r\n"),
        ("m.csv", " Image ;PROMPT;\n0.png;a cat;\n1.png;a dog;\n;;\n"),
        ("m.csv", "image\tprompt\n0.png\ta cat\n1.png\ta dog\n".encode("utf-16")),
        ("m.csv", "sep=;\r\nimage;prompt\r\n0.png;a cat\r\n1.png;a dog\r\n"),
        ("m.csv", "image,prompt\n.\\0.png,a cat\nsub\\..\\1.png,a dog\n"),
        ("m.csv", "text,prompt,image,file_name\na cat,a cat,0.png,0.png\na dog,a dog,1.png,1.png"),
        ("m.tsv", "file_name\tcaption\n0.png\ta cat\n1.png\ta dog\n"),
        ("m.json", json.dumps([{"image": "0.png", "text": "a cat"},
                               {"image": "1.png", "text": "a dog"}])),
        ("m.ndjson", lines({"image": "0.png", "prompt": "a cat"}, {"image": "1.png",
                                                                   "prompt": "a dog"})),
        ("metadata.jsonl", lines({"file_name": "0.png", "prompt": "a cat"},
                                 {"file_name": "1.png", "text": "a dog", "prompt": "a dog"})),
    ],
)  # fmt: skip
def test_manifests_as_programs_write_them(tmp_path: Path, name: str, text: str | bytes) -> None:
    (tmp_path / "sub").mkdir()
    source = read_source(manifest(tmp_path, name, text))
    assert source.bad == []
    assert [item.prompt for item in source.items] == ["a cat", "a dog"]
    assert [item.image.resolve().name for item in source.items] == ["0.png", "1.png"]
    assert source.found == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "image,prompt,text\n0.png,a,a\n1.png,b,c\n", "line 3: .*'prompt' and 'text' dif"),
        ("m.csv", "image,file_name,text\n0.png,1.png,a\n", "line 2: .*'image' and 'file_name' dif"),
        (
            "metadata.jsonl",
            lines({"file_name": "0.png", "text": "a"}, {"text": "b", "prompt": "a"}),
            "line 2: .*'prompt' and 'text' differ",
        ),
        ("m.csv", "Bild;Text\n0.png;a\n", r"no column 'image'; found 'bild', 'text' .*';'"),
        ("m.csv", "", "m.csv: the file is empty; it needs a column 'image'"),
        ("m.csv", "image,prompt\n0.png,caf\xe9\n".encode("cp1252"), "line 2: not UTF-8.*1252"),
        ("m.json", '{"image": "0.png", "prompt": "a"}', "expected a list of rows"),
        ("m.json", lines({"image": "0.png"}, {"image": "1.png"}), "line 2: .*rename it to .jsonl"),
        ("m.txt", "0.png a cat", r"\.csv or \.jsonl"),
        ("m.csv", "image,prompt\n\n", "no images to score in this manifest"),
    ],
)
def test_manifests_that_could_mean_several_things_are_refused(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_source(manifest(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_row_without_the_column_that_is_read_is_bad(tmp_path: Path) -> None:
    rows = lines({"image": "0.png", "prompt": "a"}, {"file_name": "1.png", "text": "b", "seed": 1})
    source = read_source(manifest(tmp_path, "m.jsonl", rows))
    assert [item.prompt for item in source.items] == ["a"]
    assert source.bad == [("line 2", "m.jsonl, line 2: no 'image'")]
    (note,) = source.notes
    assert note.startswith("m.jsonl: reading images from 'image' and prompts from 'prompt'; ")
    assert note.endswith("; ignoring 'file_name', 'text', 'seed'")


def test_rows_that_no_file_can_stand_for_are_bad(tmp_path: Path) -> None:
    long, folder = "x" * 300, "sub"
    (tmp_path / folder).mkdir()
    rows = [{"image": name, "prompt": "a"} for name in (long, folder, "0.png", "nul\0")]
    source: Source = read_source(manifest(tmp_path, "m.jsonl", lines(*rows)))
    assert [item.name for item in source.items] == ["0.png"]
    reasons = dict(source.bad)
    assert "File name too long" in reasons[long] and reasons[folder].startswith("not a file")
    assert source.found == 4


@pytest.mark.parametrize("name", ["metadata.csv", "Manifest.TSV", "manifest.ndjson"])
def test_the_table_in_a_folder_is_found(tmp_path: Path, name: str) -> None:
    text = "file_name\ttext\n0.png\ta cat\n1.png\ta dog\n"
    if name.endswith("json"):
        text = lines(
            {"file_name": "0.png", "text": "a cat"}, {"file_name": "1.png", "text": "a dog"}
        )
    manifest(tmp_path, name, text)
    (tmp_path / "manifest.json").write_text('{"stage": "sample"}')
    assert read(tmp_path) == ({"0.png": "a cat", "1.png": "a dog"}, {})


def test_a_prompt_id_stands_for_one_prompt(tmp_path: Path) -> None:
    text = "image,prompt,prompt_id,id\n0.png,a cat,7,a\n1.png,a dog,7 ,b\n0.png,a cat,8,c\n"
    path = manifest(tmp_path, "m.csv", text)
    found, bad = read(path)
    assert found == {"0.png": "a cat"}
    assert bad.keys() == {"a", "b"}
    assert bad["a"].startswith("prompt_id '7' is used for 2 prompts; use one per prompt")


def test_two_manifests_in_a_folder_are_refused(tmp_path: Path) -> None:
    for name in ("manifest.csv", "metadata.jsonl"):
        manifest(tmp_path, name, "")
    with pytest.raises(
        UserError, match=r"contains manifest\.csv and metadata\.jsonl; pass the one"
    ):
        read_source(tmp_path)
