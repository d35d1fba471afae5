"""Prompt sets: the three formats, what is refused, and what two sets share."""

import csv
import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from g2rpo.data.overlap import normalise, overlap
from g2rpo.data.prompts import LONGEST_ID, Prompt, read_prompt_set, read_prompts, write_texts
from g2rpo.data.tables import PROMPT_COLUMNS
from g2rpo.errors import UserError
from reproduce.commands.prompts import app

TEXTS = st.text(min_size=1, max_size=30).map(str.strip).filter(bool)
IDS = (
    st.text(st.characters(exclude_characters="/\\", exclude_categories=("C", "Z")), min_size=1)
    .filter(lambda text: not text.startswith("."))
    .filter(lambda text: len(text.encode()) <= LONGEST_ID)
)
STYLES = st.none() | TEXTS


@st.composite
def sets(draw: st.DrawFn) -> list[Prompt]:
    ids = draw(st.lists(IDS, min_size=1, max_size=6, unique=True))
    return [Prompt(identity, draw(TEXTS), draw(STYLES)) for identity in ids]


def through_a_file(name: str, write: Callable[[Path], object]) -> list[Prompt]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return read_prompts(path)


def table_of(prompts: list[Prompt], suffix: str) -> str:
    """A table of ``prompts``, by Python's own writers."""
    rows = [{"prompt": p.text, "id": p.id, "style": p.style or ""} for p in prompts]
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO(newline="")
    # Carriage returns are not quoted otherwise.
    writer = csv.DictWriter(text, ("prompt", "id", "style"), quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


# --- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["set.csv", "set.jsonl"])
@settings(max_examples=30)
@given(prompts=sets())
def test_csv_and_jsonl_give_back_what_was_written(name: str, prompts: list[Prompt]) -> None:
    text = table_of(prompts, Path(name).suffix).encode()
    assert through_a_file(name, lambda path: path.write_bytes(text)) == prompts


def is_plain(text: str) -> bool:
    """Whether no line of a .txt file that is ``text`` looks like a table or another format."""
    return not set(text) & set("\r\n\ufeff\t\0[{,;|:-") and text.casefold() not in PROMPT_COLUMNS


@settings(max_examples=30)
@given(texts=st.lists(TEXTS.filter(is_plain), min_size=1))
def test_txt_gives_back_the_texts_and_numbers_them(texts: list[str]) -> None:
    numbered = [Prompt(f"{number:06d}", text) for number, text in enumerate(texts)]
    assert through_a_file("set.txt", lambda path: write_texts(path, texts)) == numbered


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a red cube \r\nein blauer Würfel\nline\u2028break\x0band\x85more\n".encode())
    found = read_prompts(file)
    assert [prompt.id for prompt in found] == ["000000", "000001", "000002"]
    assert found[0].text == "a red cube"
    assert found[1].text == "ein blauer Würfel"
    assert found[2].text == "line\u2028break\x0band\x85more"
    assert read_prompts(file, limit=2) == found[:2]
    file.write_bytes(b"\xef\xbb\xbffirst\nlast")
    assert [prompt.text for prompt in read_prompts(file)] == ["first", "last"]


def test_txt_is_not_written_if_it_cannot_be_read_back(tmp_path: Path) -> None:
    for texts, message in (
        (["one", "two\nlines"], r"a prompt has a line break: 'two\\nlines'"),
        (["Prompt", "a cat"], "could not be read back .*header of a table"),
    ):
        with pytest.raises(UserError, match=message):
            write_texts(tmp_path / "set.txt", texts)
        assert not (tmp_path / "set.txt").exists()


def test_id_and_style_may_be_left_out(tmp_path: Path) -> None:
    csv = written(tmp_path, "a.csv", 'style,prompt\nphoto,"a cat, a dog"\n,plain\n')
    assert read_prompts(csv) == [
        Prompt("000000", "a cat, a dog", "photo"),
        Prompt("000001", "plain"),
    ]
    lines = '{"prompt": "a"}\r\n{"prompt": "b", "style": null}\n{"prompt": "c", "id": "z"}\n'
    assert read_prompts(written(tmp_path, "a.jsonl", lines)) == [
        Prompt("000000", "a"),
        Prompt("000001", "b"),
        Prompt("z", "c"),
    ]
    assert read_prompts(csv, limit=1)[0].style == "photo"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,id\nx,1\ny,1\n", r"line 3: duplicate id '1', also in line 2"),
        ("a.csv", "prompt,id\nx,\n", r"line 2: the id '' is empty"),
        ("a.csv", "prompt,id\nx,1\n  ,2\n", r"line 3: empty prompt"),
        ("a.csv", "prompt\nx\n\ny\n", r"line 3: empty prompt"),
        ("a.csv", "prompt,di\nx,1\n", r"unknown column 'di'; did you mean 'id'"),
        (
            "a.csv",
            "id\n1\n",
            r"no column 'prompt'; found 'id' \(separated by ','\); rename a column to 'prompt'",
        ),
        ("a.csv", "prompt,prompt\nx,y\n", r"line 1: duplicate column"),
        ("a.csv", "prompt,id\na cat, a dog,1\n", r"line 2: 3 values.* double quotes"),
        ("a.csv", 'prompt\n"open\n', r"not valid CSV"),
        ("a.csv", "prompt\n", r"no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', r"line 2: not valid JSON"),
        ("a.jsonl", '{"prompt": "x", "id": 3}\n', r"line 1: id must be a string"),
        ("a.jsonl", '{"prompt": "x", "styel": "3"}\n', r"unknown column 'styel'.*'style'"),
        ("a.jsonl", '{"prompt": "x", "Prompt": "y"}\n', r"line 1: .*case or spaces"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": " "}\n', r"line 2: empty prompt"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": "y", "id": "000000"}\n',
            r"line 2: duplicate id '000000', also in line 1",
        ),
        (
            "a.jsonl",
            '{"prompt": "x", "id": "a/b"}\n',
            r"line 1: the id 'a/b' is not a valid file name",
        ),
        ("a.jsonl", '{"prompt": "x", "id": ".."}\n', r"not a valid file name"),
        ("a.jsonl", '{"prompt": "x", "id": "a\\u0000b"}\n', r"not a valid file name"),
        ("a.jsonl", json.dumps({"prompt": "x", "id": "ü" * 101}), r"longer than 200 bytes"),
        ("a.txt", "x\n\ny\n", r"line 2: empty prompt"),
        ("a.txt", "x\n\n", r"line 2: empty prompt"),
        ("a.txt", "\n", r"line 1: empty prompt"),
        ("a.txt", "", r"no prompts"),
        ("a.md", "x", "unknown suffix .md; save the prompts as .txt .*, .csv, .tsv, .json, "),
        ("prompts", "x", "no suffix; save the prompts as"),
        ("a.json", "{}", "the file is empty"),
        ("a.json", '"a cat"', "expected a list of rows"),
        ("a.json", '[["a cat"]]', "entry 1: expected an object"),
        ("a.json", '{"anime": ["a cat"]}', "entry 'anime': prompt must be a string"),
        ("a.json", '{"prompt": "a cat", "id": "1"}', "'prompt' outside of a list"),
        ("a.json", '{"prompts": ["a"], "text": ["b"]}', "'text' outside of a list"),
        ("a.json", '{"q1": "a", "q1": "b"}', "duplicate key 'q1'"),
        ("a.json", '["a",\n"b"', "line 2: not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", '["\\ud83d"]', "entry 1: the prompt is not valid Unicode"),
        ("a.yaml", "q1: a\nq1: b\n", "duplicate key 'q1'"),
        ("a.yaml", "- a\n- [b\n", "not valid YAML: .*line 2|not valid YAML: .*line 3"),
        ("a.yaml", "- a cat: on a mat\n", "no column 'prompt'; found 'a cat' .*quotes"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: no 'prompt'; found 'text'"),
        ("a.csv", "prompt,caption\na,b\n", "line 2: .*'prompt' and 'caption' differ"),
        ("a.csv", "promt,id\na,b\n", "unknown column 'promt'; did you mean 'prompt'"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_missing_prompt_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such prompt file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="a folder"):
        read_prompts(tmp_path)


CATS = [Prompt("000000", "a cat"), Prompt("000001", "yes: a, dog")]
NAMED = [Prompt("q1", "a cat", "photo"), Prompt("q2", "yes: a, dog")]


@pytest.mark.parametrize(
    ("name", "text", "expected", "note"),
    [
        ("a.txt", "a cat\nyes: a, dog", CATS, ""),
        ("a.txt", "a cat\r\r\nyes: a, dog\r\r\n", CATS, ""),
        ("a.txt", "a cat\ryes: a, dog\r", CATS, ""),
        ("a.json", '["a cat", "yes: a, dog"]', CATS, ""),
        ("a.json", '{"prompts": ["a cat", "yes: a, dog"]}', CATS, ""),
        ("a.json", '[{"prompt": "a cat"}, {"Prompt": "yes: a, dog"}]', CATS, ""),
        ("a.jsonl", '"a cat"\n{"prompt": "yes: a, dog"}\n', CATS, ""),
        ("a.ndjson", '{"prompt": "a cat"}\r\r\n{"prompt": "yes: a, dog"}\r\r\n\r\r\n', CATS, ""),
        ("a.yaml", "- a cat\n- 'yes: a, dog'\n", CATS, ""),
        ("a.yml", 'prompts:\n- a cat\n- prompt: "yes: a, dog"\n', CATS, ""),
        ("a.csv", "\ufeffPrompts,Category\na cat,animals\n\"yes: a, dog\",x\n", CATS, "'category'"),
        ("A.TSV", "Prompt\tNote\tX\na cat\tx\t\nyes: a, dog\ty\tz\n", CATS, "ignoring 'note', 'x'"),
        ("a.csv", "text;seed\na cat;1\nyes: a, dog;2\n", CATS, "'text'; ignoring 'seed'"),
        ("a.jsonl", '{"text": "a cat"}\n{"text": "yes: a, dog", "x": [1]}\n', CATS, "'text'"),
        ("a.json", '{"q1": {"prompt": "a cat", "style": "photo"}, "q2": "yes: a, dog"}', NAMED, ""),
        ("a.yaml", "q1: {prompt: a cat, style: photo}\nq2: 'yes: a, dog'\n", NAMED, ""),
        ("a.yaml", "seed: 3\nprompts:\n  q1: {prompt: a cat, style: photo}\n  q2: 'yes: a, dog'\n",
         NAMED, "ignoring 'seed'"),
    ],
)  # fmt: skip
def test_the_suffix_says_how_a_set_is_read(
    tmp_path: Path, name: str, text: str, expected: list[Prompt], note: str
) -> None:
    found = read_prompt_set(written(tmp_path, name, text))
    assert found.prompts == expected
    assert note in found.note and bool(note) == bool(found.note)


def test_yaml_stays_the_text_that_is_written(tmp_path: Path) -> None:
    words = ["yes", "12:30:00", "1e3", "null", "~", "0o17", "2026-11-29", "0x1F", "1_000", ".inf"]
    tagged = ["!!python/object/apply:os.getcwd []", "- &all [*all]"]
    path = written(tmp_path, "a.yaml", "".join(f"- {word}\n" for word in words))
    assert [prompt.text for prompt in read_prompts(path)] == words
    path = written(tmp_path, "b.yaml", "".join(f"{word}: {word}\n" for word in words[:-1]))
    assert [(prompt.id, prompt.text) for prompt in read_prompts(path)] == [
        (word, word) for word in words[:-1]
    ]
    for text in tagged:
        with pytest.raises(UserError, match=r"c\.yaml"):
            read_prompts(written(tmp_path, "c.yaml", f"- {text}\n"))


def test_quotation_marks_of_a_published_tsv_are_text(tmp_path: Path) -> None:
    text = (
        'Prompt\tNote\n"Hi" on a sign\tx\na 6" pipe\ty\n"say ""hi"", all"\tz\n"two\tu\nlines"\tv\n'
    )
    found = [prompt.text for prompt in read_prompts(written(tmp_path, "a.tsv", text))]
    assert found == ['"Hi" on a sign', 'a 6" pipe', 'say "hi", all', '"two', 'lines"']
    path = written(tmp_path, "b.tsv", '\nPrompt\tNote\n"Hi" on a sign\tx\n')
    assert [prompt.text for prompt in read_prompts(path)] == ['"Hi" on a sign']


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_marked_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    for name, text in (("a.txt", "é 猫\n"), ("a.json", '["é 猫"]'), ("a.csv", "prompt\né 猫\n")):
        (tmp_path / name).write_text(text, encoding=encoding)
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["é 猫"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a cat", "a dog"]', "like JSON; rename it to .json"),
        ('[\n"a cat",\n"a dog"]', "like JSON"),
        ("['a cat']", "like JSON"),
        ('{"prompt": "a cat"}\n', "like JSON"),
        ("prompt,id\na cat,1\n", "'prompt,id' is the header of a table; rename it to .csv"),
        ('"Prompts";"Category"\na cat;x\n', "header of a table"),
        ("Prompt\na cat\n", "header of a table"),
        ("Prompt\tNote\na cat\tx\na dog\ty\n", "most lines have tabs; rename it to .tsv"),
        ("- a cat\n- a dog\n", "like YAML; rename it to .yaml"),
        ("prompts:\n- a cat\n", "like YAML"),
        ("a cat\0\n", "NUL"),
    ],
)
def test_a_txt_that_is_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(written(tmp_path, "a.txt", text))


def test_unusual_prompts_are_prompts(tmp_path: Path) -> None:
    texts = [
        "[photo] a cat",
        "{red|blue} hair",
        "text, sign",
        "- 5 degrees",
        "Poster:",
        "a\tb",
        "x",
    ]
    path = written(tmp_path, "a.txt", "".join(text + "\n" for text in texts))
    assert [prompt.text for prompt in read_prompts(path)] == texts
    for text in texts[:3]:
        assert read_prompts(written(tmp_path, "b.txt", f"{text}\na dog\n"))[0].text == text


# --- normalising and overlap ---------------------------------------------------------------------


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@given(TEXTS)
def test_case_width_punctuation_and_spaces_do_not_count(text: str) -> None:
    assert normalise(f"  X. {text}\t!") == normalise(f"x {text}")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("A red cat.", "a   RED, cat"),
        ("ＡＢＣ ﬁsh", "abc fish"),
        ("Straße", "STRASSE"),
        ("a cat -- at night", "a cat — at night!"),
    ],
)
def test_the_same_prompt_in_other_clothes(first: str, second: str) -> None:
    assert normalise(first) == normalise(second)


def test_other_prompts_stay_apart() -> None:
    texts = ["a cat", "a bat", "cat a", "1 + 1", "1 - 1", "!!!", "???", "猫", "犬", "😀", "😡"]
    assert len({normalise(text) for text in texts}) == len(texts)


@settings(max_examples=30)
@given(sets(), sets())
def test_overlap_is_symmetric_and_whole_with_itself(a: list[Prompt], b: list[Prompt]) -> None:
    assert overlap(a, b) == overlap(b, a)
    assert set(overlap(a, a)[0]) == {prompt.text for prompt in a}
    exact, normalised = overlap(a, b)
    assert set(map(normalise, exact)) <= set(normalised)


def test_overlap_counts_a_prompt_once() -> None:
    train = [Prompt("0", "a cat"), Prompt("1", "a cat"), Prompt("2", "A dog!")]
    test = [Prompt("0", "a dog"), Prompt("1", "a cat")]
    assert overlap(train, test) == (("a cat",), ("a cat", "a dog"))


def test_check_shows_counts_and_the_first_ten_examples(tmp_path: Path) -> None:
    text = "".join(f"prompt {n}\n" for n in range(28)) + "Prompt 1.\nein  Hund – groß\n"
    train = written(tmp_path, "train.txt", text)
    test = written(tmp_path, "test.csv", "prompt\n" + "".join(f"Prompt {n}!\n" for n in range(12)))
    result = CliRunner().invoke(app, ["check", str(train), str(test)])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    assert lines[0] == (
        f"{train}: 30 prompts (29 distinct), 62 words, {len(text.encode())} bytes, SHA-256 {sha256}"
    )
    assert lines[2].startswith("in both: 0 prompts exactly, 12 ignoring case")
    assert lines[3:] == [f"  {t}" for t in sorted(f"prompt {n}" for n in range(12))[:10]] + [
        "  … and 2 more"
    ]
