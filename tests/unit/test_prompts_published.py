"""The published prompt sets: counted, parted the same way every time, written for profiles."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, serve, use_empty_caches
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from g2rpo.data.overlap import normalise, overlap
from g2rpo.data.prompts import read_prompt_set, read_prompts
from g2rpo.errors import UserError
from g2rpo.hub import lock, prompt_sets
from g2rpo.hub.catalogue import Catalogue, catalogue
from g2rpo.hub.prompt_sets import split_validation
from g2rpo.rewards.soft_tifa import YES, read_questions
from reproduce.commands.prompts import app

REPO = "Tencent-Hunyuan/MixGRPO"
TRAIN = [f"a picture of {n} cats" for n in range(900)] + ["", "  padded ", "Test Prompt 3!"]
TEST = [f"test prompt {n}" for n in range(40)]
STYLES = ("anime", "concept-art", "paintings", "photo")
GENEVAL: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "two clocks",
    },
]
GENEVAL2: list[dict[str, Any]] = [
    {
        "prompt": f"{number} blue dogs",
        "atom_count": count,
        "vqa_list": [["How many dogs are in the image?", number], ["Are the dogs blue?", "Yes"]],
        "skills": ["count", "attribute"],
    }
    for number, count in (("two", 3), ("ten", 10))
]
DPG_QUESTION = {
    "proposition_id": "2",
    "dependency": "1",
    "category_broad": "attribute",
    "category_detailed": "color",
    "tuple": "attribute - color (cube, red)",
    "question_natural_language": 'Is the "cube", seen first, red?',
}
BENCHMARKS = {
    ("sayakpaul/drawbench", "DrawBench Prompts - Sheet1.csv"): (
        "Prompts,Category\r\nA red car.,Colors\r\n"
        '"A sign, ""Hi"".\nOn a wall.",Text\r\nA red car.,Colors\r\n\r\n,\r\n'
    ),
    ("google-research/parti", "PartiPrompts.tsv"): (
        "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology\n"
        '"Fly" on a wall, café \tArts\tComplex\t\n\n'
    ),
    ("djghosh13/geneval", "prompts/evaluation_metadata.jsonl"): GENEVAL,
    ("facebookresearch/GenEval2", "geneval2_data.jsonl"): GENEVAL2,
    ("TencentQQGYLab/ELLA", "dpg_bench/dpg_bench.csv"): (
        f"item_id,text,keywords,{','.join(DPG_QUESTION)}\n"
        '12,"A cube, red.",cube,1,0,entity,whole,entity - whole (cube),Is there a cube?\n'
        '12,"A cube, red.",cube,2,1,attribute,color,"attribute - color (cube, red)",'
        '"Is the ""cube"", seen first, red?"\n'
        "vrd9,Two dogs.,,1,0,entity,whole,entity - whole (dogs),Are there dogs?\n"
    ),
}
COUNTS = {
    "hpdv2-train": (len(TRAIN), None),
    "hpdv2-test": (len(TEST), None),
    "hpsv2-benchmark": (8, 4),
    "drawbench": (3, 2),
    "partiprompts": (2, 2),
    "geneval": (2, 2),
    "geneval2": (2, 2),
    "t2i-compbench": (16, 8),
    "dpg-bench": (2, None),
}


def json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows) + "\n"


def small_catalogue() -> Catalogue:
    """The catalogue with lists of other lengths and without hashes."""
    artifacts = []
    for artifact in catalogue().artifacts:
        if artifact.name in COUNTS:
            files = tuple(
                f.model_copy(update={"size": None, "sha256": None}) for f in artifact.files
            )
            prompts, categories = COUNTS[artifact.name]
            change = {"prompts": prompts, "categories": categories, "files": files}
            artifacts.append(artifact.model_copy(update=change))
    return Catalogue(artifacts=tuple(artifacts))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    use_empty_caches(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    small = small_catalogue()
    for module in (prompt_sets, lock):
        monkeypatch.setattr(module, "catalogue", lambda: small)
    with serve() as running:
        running.add(REPO, "data/prompts.txt", ("\n".join(TRAIN) + "\n").encode())
        running.add(REPO, "data/prompts_test.txt", ("\n".join(TEST) + "\n").encode())
        for style in STYLES:
            texts = [f"{style} {n}" for n in range(2)]
            running.add("zhwang/HPDv2", f"benchmark/{style}.json", json.dumps(texts).encode())
        for (repo, path), text in BENCHMARKS.items():
            running.add(repo, path, (text if isinstance(text, str) else json_lines(text)).encode())
        for file in catalogue().select(["t2i-compbench"], ["prompts"])[0].files:
            lines = f"a red book and a cup\n  {Path(file.path).stem}, it's\n\n\n".encode()
            running.add("Karine-Huang/T2I-CompBench", file.path, lines)
        yield running


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_files_of_the_profile_flux_are_written(hub: FakeHub, tmp_path: Path) -> None:
    result = run("fetch", "--mirror", hub.address)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "data" / "hpdv2"
    train, validation, test = (
        read_prompts(folder / f"{name}.txt") for name in ("train", "validation", "test")
    )
    assert [prompt.text for prompt in test] == TEST
    assert len(validation) == 400
    assert len(train) + len(validation) == len(TRAIN) - 1  # without the empty line
    assert overlap(train, validation) == ((), ())
    assert overlap(validation, test) == ((), ())
    assert overlap(train, test)[1] == ("test prompt 3",)  # reported by `check`, not removed
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.log.clear()
    assert run("fetch", "--offline").exit_code == 0
    assert hub.log == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_benchmark_keeps_its_styles(hub: FakeHub, tmp_path: Path) -> None:
    output = tmp_path / "b"
    result = run("fetch", "hpsv2-benchmark", "--output", str(output), "--mirror", hub.address)
    assert result.exit_code == 0, result.output
    prompts = read_prompts(output / "benchmark.jsonl")
    assert [p.style for p in prompts] == [style for style in STYLES for _ in range(2)]
    assert prompts[3].id == "concept-art-00001"
    assert "cached" in run("list").output


def written(hub: FakeHub, name: str) -> tuple[Path, list[dict[str, Any]]]:
    """The file of a benchmark, and its lines, which are read back as prompts."""
    result = run("fetch", name, "--mirror", hub.address)
    assert result.exit_code == 0, result.exception
    path = Path("data", "prompts", f"{name}.jsonl")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in result.output
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(p.id, p.text, p.style) for p in read_prompts(path)] == [
        (entry["id"], entry["prompt"], entry.get("style")) for entry in entries
    ]
    return path, entries


def test_benchmarks_are_written_with_their_categories(hub: FakeHub) -> None:
    _, entries = written(hub, "drawbench")
    assert entries == [
        {"prompt": "A red car.", "id": "00000", "style": "Colors"},
        {"prompt": 'A sign, "Hi".\nOn a wall.', "id": "00001", "style": "Text"},
        {"prompt": "A red car.", "id": "00002", "style": "Colors"},
    ]
    _, entries = written(hub, "partiprompts")
    assert entries[0] == {
        "prompt": "bond", "id": "00000", "style": "Abstract", "challenge": "Basic",
    }  # fmt: skip
    assert entries[1]["prompt"] == '"Fly" on a wall, café'
    _, entries = written(hub, "t2i-compbench")
    assert [entry["style"] for entry in entries[::2]] == [
        *("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial"),
        "complex",
    ]
    assert entries[1] == {"prompt": "color_val, it's", "id": "color-00001", "style": "color"}


def test_benchmarks_keep_what_their_scorers_need(hub: FakeHub) -> None:
    path, entries = written(hub, "geneval")
    assert entries == [
        {"id": f"{number:05d}", "style": line["tag"]} | line for number, line in enumerate(GENEVAL)
    ]
    note = read_prompt_set(path).note
    assert (
        note == "geneval.jsonl: reading prompts from 'prompt'; ignoring 'tag', 'include', 'exclude'"
    )
    path, entries = written(hub, "geneval2")
    assert [entry["style"] for entry in entries] == ["03 atoms", "10 atoms"]
    assert all(line.items() <= entry.items() for line, entry in zip(GENEVAL2, entries, strict=True))
    assert read_questions(path)["ten blue dogs"][1] == ("Are the dogs blue?", YES)
    _, entries = written(hub, "dpg-bench")
    assert [(entry["id"], len(entry["questions"])) for entry in entries] == [("12", 2), ("vrd9", 1)]
    assert entries[0]["questions"][1] == DPG_QUESTION
    assert "style" not in entries[0]


def test_the_list_shows_every_set(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path, _ = written(hub, "geneval")
    lines = {line.split()[1]: line for line in run("list").output.splitlines()[1:] if line.strip()}
    assert lines.keys() == COUNTS.keys()
    assert "cached, written" in lines["geneval"] and " MIT " in lines["geneval"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() in lines["geneval"]
    monkeypatch.setattr(prompt_sets, "catalogue", catalogue)
    assert "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43" in run("list").output


@pytest.mark.parametrize(
    ("name", "repo", "path", "text", "message"),
    [
        (
            *("drawbench", "sayakpaul/drawbench", "DrawBench Prompts - Sheet1.csv"),
            "Prompts,Category\na,Colors\nb,Colors\nc,Colors\n",
            "drawbench: 1 categories, expected 2; the published list has changed",
        ),
        (
            *("geneval", "djghosh13/geneval", "prompts/evaluation_metadata.jsonl"),
            '{"prompt": "a"}\n',
            "line 1: not in the published format",
        ),
        (
            *("dpg-bench", "TencentQQGYLab/ELLA", "dpg_bench/dpg_bench.csv"),
            f"item_id,text,{','.join(DPG_QUESTION)}\n1,a,,,,,,\n1,b,,,,,,\n",
            "line 3: 1 has two texts",
        ),
    ],
)
def test_other_formats_are_refused(
    hub: FakeHub, name: str, repo: str, path: str, text: str, message: str
) -> None:
    hub.add(repo, path, text.encode())
    error = run("fetch", name, "--mirror", hub.address).exception
    assert isinstance(error, UserError)
    assert message in str(error)


def test_a_list_of_another_length_is_refused(hub: FakeHub) -> None:
    hub.add(REPO, "data/prompts_test.txt", b"one\ntwo\n")
    error = run("fetch", "--mirror", hub.address).exception
    assert isinstance(error, UserError)
    assert "hpdv2-test: 2 prompts, expected 40" in str(error)
    hub.add("zhwang/HPDv2", "benchmark/anime.json", b"{}")
    error = run("fetch", "hpsv2-benchmark", "--mirror", hub.address).exception
    assert isinstance(error, UserError)
    assert "anime.json is not a list of prompts" in str(error)
    error = run("fetch", "hpd").exception
    assert isinstance(error, UserError)
    assert "unknown prompt set 'hpd'; did you mean 'hpdv2'?" in str(error)


def test_the_published_test_list_is_checked_by_its_hash(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_sets, "catalogue", catalogue)
    artifact = prompt_sets.artifact_named("hpdv2-test")
    assert (artifact.prompts, artifact.files[0].size) == (400, 32967)
    hub.add(REPO, "data/prompts_test.txt", b"x" * 32967)
    with pytest.raises(UserError, match=r"prompts_test\.txt is altered.*expected 6eb1c5561a58…"):
        prompt_sets.fetch(artifact, lock.Lock(), prompt_sets.FetchOptions(hub.address))


@given(
    train=st.lists(st.text("ab .!", min_size=1), min_size=1, max_size=40),
    test=st.lists(st.text("ab .!", min_size=1), max_size=5),
    count=st.integers(1, 5),
)
def test_the_split_is_disjoint_whole_and_independent_of_order(
    train: list[str], test: list[str], count: int
) -> None:
    distinct = {normalise(text) for text in train} - {normalise(text) for text in test}
    if len(distinct) <= count:
        with pytest.raises(UserError, match="cannot hold out"):
            split_validation(train, test, count)
        return
    rest, validation = split_validation(train, test, count)
    keys = {normalise(text) for text in validation}
    assert len(keys) == len(validation) == count
    assert not keys & {normalise(text) for text in rest}
    assert not keys & {normalise(text) for text in test}
    assert {normalise(text) for text in [*rest, *validation]} == {normalise(t) for t in train}
    again = split_validation(train[::-1], test, count)[1]
    assert {normalise(text) for text in again} == keys


def test_the_split_does_not_change_between_versions() -> None:
    _, validation = split_validation([f"prompt {n}" for n in range(1000)], [], 400)
    digest = hashlib.sha256("\n".join(validation).encode()).hexdigest()
    assert digest == "066a8d4520509f409d6df952b1868f8b1763a826d9e6065dc2f594327cc734f4"
