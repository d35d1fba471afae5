"""The scoring engine: nothing lost, nothing scored twice, nothing skipped silently."""

import csv
import io
import json
import math
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.evaluation.scoring import summary
from benchmarks.evaluation.scoring.engine import COLUMNS, Ranks, Scorer
from benchmarks.evaluation.scoring.items import Item, read_source, refuse_bad
from benchmarks.evaluation.scoring.journal import journal_name
from g2rpo.data.prompts import Prompt
from g2rpo.errors import UserError
from g2rpo.rewards.base import BatchedReward, RewardConfig
from g2rpo.stop import Stopped, StopReason, StopRequest


class Brightness(BatchedReward):
    """Mean brightness plus a hundredth of the prompt's length, and its two parts."""

    name = "brightness"
    part_names = ("mean", "length")

    def __init__(self, batch_size: int = 3, memory: int = 1000, fail_after: int = 1000) -> None:
        super().__init__("cpu", batch_size, "1", "abc")
        self.memory, self.fail_after = memory, fail_after
        self.sizes: list[int] = []

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> "Brightness":
        return cls()

    def evaluate(self, prepared: Any) -> Tensor:
        images, prompts = prepared
        if len(images) > self.memory:
            raise torch.OutOfMemoryError("too many")
        if sum(self.sizes) >= self.fail_after:
            raise KeyboardInterrupt
        self.sizes.append(len(images))
        means = torch.stack([image.float().mean() for image in images])
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return torch.stack([means + lengths / 100, means, lengths], 1)

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        return [len(prompt) > 8 for prompt in prompts]


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Images of all sizes, two for each of five prompts, in no order."""
    draws = np.random.default_rng(1)
    made = []
    for index in range(10):
        size = (int(draws.integers(4, 40)), int(draws.integers(4, 40)), 3)
        path = tmp_path / "images" / f"p{index % 5}_{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draws.integers(0, 256, size, dtype=np.uint8)).save(path)
        prompt = "prompt " + "x" * (index % 5)
        made.append(Item(path.stem, path, prompt, f"p{index % 5}", "ab"[index % 2]))
    random.Random(0).shuffle(made)
    return made


def expected(items: Sequence[Item]) -> list[float]:
    means = [np.asarray(Image.open(item.image)).mean() for item in items]
    return [mean + len(item.prompt) / 100 for mean, item in zip(means, items, strict=True)]


def check(scores: pd.DataFrame, items: Sequence[Item]) -> None:
    own = scores[scores["reward"] == "light"]
    assert list(own["id"]) == [item.id for item in items]
    np.testing.assert_allclose(own["score"], expected(items), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_do_not_depend_on_batches(
    items: list[Item], tmp_path: Path, batch_size: int
) -> None:
    scorer = Scorer(tmp_path / "journal", items)
    scores = scorer.score("light", Brightness(batch_size))
    check(scores, items)
    assert tuple(scores.columns) == COLUMNS
    assert scores["score"].dtype == np.float32
    assert list(scores["reward"].unique()) == ["light", "light.mean", "light.length"]
    assert scorer.too_long == {"light": ["p2", "p3", "p4"]}
    lengths = scores[scores["reward"] == "light.length"]["score"]
    assert list(lengths) == [float(len(item.prompt)) for item in items]


def test_an_interruption_loses_one_batch_at_most(items: list[Item], tmp_path: Path) -> None:
    stopped = Brightness(3, fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        Scorer(tmp_path / "journal", items).score("light", stopped)
    assert sum(stopped.sizes) == 6
    (path,) = (tmp_path / "journal").iterdir()
    path.write_bytes(path.read_bytes()[:-30])  # a line cut short is scored again
    for left in (5, 0):
        again = Brightness(3)
        check(Scorer(tmp_path / "journal", items).score("light", again), items)
        assert sum(again.sizes) == left


def test_a_changed_image_prompt_or_model_is_scored_again(items: list[Item], tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    Scorer(journal, items).score("light", Brightness())
    Image.new("RGB", (5, 5), "white").save(items[0].image)
    items[1] = Item(items[1].id, items[1].image, "another", items[1].prompt_id)
    again = Brightness()
    check(Scorer(journal, items).score("light", again), items)
    assert sum(again.sizes) == 2
    for changes in ({"template_hash": "a new question"}, {"settings": {"dtype": "bfloat16"}}):
        other = Brightness()
        vars(other).update(changes)
        check(Scorer(journal, items).score("light", other), items)
        assert sum(other.sizes) == 10


def test_several_processes_share_the_work(items: list[Item], tmp_path: Path) -> None:
    barrier = threading.Barrier(2, timeout=600)

    def work(rank: int) -> tuple[Brightness, pd.DataFrame]:
        model = Brightness()
        scorer = Scorer(
            tmp_path / "journal", items, Ranks(rank, 2, wait=lambda: barrier.wait() and None)
        )
        return model, scorer.score("light", model)

    with ThreadPoolExecutor(2) as pool:
        (first, scores), (second, _) = pool.map(work, (0, 1))
    check(scores, items)
    assert (sum(first.sizes), sum(second.sizes)) == (5, 5)
    names = sorted(path.name[-12:] for path in (tmp_path / "journal").iterdir())
    assert names == ["-rank0.jsonl", "-rank1.jsonl"]
    alone = Brightness()
    check(Scorer(tmp_path / "journal", items).score("light", alone), items)
    assert alone.sizes == []


class Stopping(Brightness):
    """Asks this process to stop when it has scored a batch."""

    def evaluate(self, prepared: Any) -> Tensor:
        StopRequest.request("enough", resume=True)
        return super().evaluate(prepared)


@pytest.fixture
def no_request() -> Iterator[None]:
    yield
    StopRequest.clear()


@pytest.mark.usefixtures("no_request")
def test_a_stop_between_batches_keeps_what_is_scored(items: list[Item], tmp_path: Path) -> None:
    scorer = Scorer(tmp_path / "journal", items)
    first = Stopping()
    with pytest.raises(Stopped, match="enough"):
        scorer.score("light", first)
    assert first.sizes == [3]
    with pytest.raises(Stopped):  # asked for before it begins
        scorer.score("light", first)
    assert first.sizes == [3]
    StopRequest.clear()
    rest = Brightness()
    check(scorer.score("light", rest), items)
    assert sum(rest.sizes) == 7
    StopRequest.request("enough", resume=True)
    check(scorer.score("light", rest), items)  # nothing was left to stop


@pytest.mark.usefixtures("no_request")
def test_processes_stop_together(items: list[Item], tmp_path: Path) -> None:
    """One has nothing left to score when the other stops: it stops as well, and is not stuck."""
    barrier = threading.Barrier(2, timeout=600)
    shared: dict[int, StopReason | None] = {}

    def work(rank: int) -> Stopped:
        def share(reason: StopReason | None) -> list[StopReason | None]:
            shared[rank] = reason
            barrier.wait()
            return [shared[0], shared[1]]

        mine = Ranks(rank, 2, wait=lambda: barrier.wait() and None, share=share)
        scorer = Scorer(tmp_path / "journal", items, mine)
        model = Stopping(batch_size=2) if rank == 1 else Brightness(batch_size=5)
        with pytest.raises(Stopped, match="enough") as caught:
            scorer.score("light", model)
        return caught.value

    with ThreadPoolExecutor(2) as pool:
        assert all(stopped.resume for stopped in pool.map(work, (0, 1)))
    assert shared[1] is not None
    StopRequest.clear()
    check(Scorer(tmp_path / "journal", items).score("light", Brightness()), items)


def test_batches_shrink_until_they_fit(items: list[Item], tmp_path: Path) -> None:
    model = Brightness(8, memory=2)
    scorer = Scorer(tmp_path / "journal", items)
    check(scorer.score("light", model), items)
    assert scorer.batch_size == {"light": 2}
    with pytest.raises(UserError, match="out of memory in reward brightness with one image"):
        Scorer(tmp_path / "other", items).score("light", Brightness(8, memory=0))


def test_a_damaged_image_stops_or_is_listed(items: list[Item], tmp_path: Path) -> None:
    for item in (items[4], items[7]):
        item.image.write_bytes(item.image.read_bytes()[:50])
    names = rf"2 images cannot be scored.*{items[4].image.name}.*{items[7].image.name}.*--skip-bad"
    with pytest.raises(UserError, match=names):
        Scorer(tmp_path / "journal", items)
    scorer = Scorer(tmp_path / "journal", items, skip_bad=True)
    scores = scorer.score("light", Brightness())
    check(scores, [item for item in items if item not in (items[4], items[7])])
    assert [name for name, _ in scorer.skipped] == [items[4].id, items[7].id]
    with pytest.raises(UserError, match="nothing can be scored"):
        Scorer(tmp_path / "journal", [items[4]], skip_bad=True)


@pytest.mark.parametrize("factors", [[math.nan] * 3, [1.0, math.inf, 1.0]])
def test_a_score_or_part_that_is_not_finite_names_its_prompt(
    items: list[Item], tmp_path: Path, factors: list[float]
) -> None:
    class Broken(Brightness):
        def evaluate(self, prepared: Any) -> Tensor:
            return super().evaluate(prepared) * torch.tensor(factors)

    with pytest.raises(UserError, match="not finite for prompt 'prompt"):
        Scorer(tmp_path / "journal", items).score("light", Broken())


def test_what_an_old_process_left_does_not_hide_what_is_new(
    items: list[Item], tmp_path: Path
) -> None:
    """Another rank's journal is read later, but its entry is of the image as it was."""
    journal = tmp_path / "journal"
    name = journal_name(Brightness())
    Scorer(journal, items).score("light", Brightness())
    (journal / f"{name}-rank0.jsonl").rename(journal / f"{name}-rank1.jsonl")
    Image.new("RGB", (5, 5), "white").save(items[0].image)
    again = Brightness()
    check(Scorer(journal, items).score("light", again), items)
    assert sum(again.sizes) == 1
    check(Scorer(journal, items).score("light", Brightness()), items)


def test_an_image_that_vanishes_while_scoring_is_named(items: list[Item], tmp_path: Path) -> None:
    scorer = Scorer(tmp_path / "journal", items)
    Image.new("RGB", (5, 5)).save(items[2].image)
    with pytest.raises(UserError, match=rf"{items[2].image.name}: changed"):
        scorer.score("light", Brightness())


class TestSources:
    PROMPTS = (Prompt("p0", "zero"), Prompt("p0_a", "zero a", "photo"), Prompt("p1", "one"))

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("p0.png", "p0_1.jpg", "p0_a.png", "sub/p1_x.webp"):
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
        (tmp_path / "images" / "notes.md").write_text("no image")
        return tmp_path / "images"

    def test_file_names_name_prompts(self, folder: Path) -> None:
        source = read_source(folder, self.PROMPTS)
        assert source.bad == []
        found = {item.id: (item.prompt_id, item.prompt, item.style) for item in source.items}
        assert found == {
            "p0": ("p0", "zero", None),
            "p0_1": ("p0", "zero", None),
            "p0_a": ("p0_a", "zero a", "photo"),
            "sub/p1_x": ("p1", "one", None),
        }

    def test_what_does_not_match_is_reported(self, folder: Path) -> None:
        source = read_source(folder, [*self.PROMPTS[:2], Prompt("p9", "nine")])
        assert dict(source.bad).keys() == {"sub/p1_x", "p9"}
        with pytest.raises(
            UserError, match=r"1 image and 1 prompt cannot be scored: sub/p1_x: .*p9: .*--skip-bad"
        ):
            refuse_bad(source, skip=False)
        refuse_bad(source, skip=True)

    def test_a_reason_of_many_images_is_given_once(self, folder: Path) -> None:
        with pytest.raises(UserError) as refused:
            refuse_bad(read_source(folder, [Prompt("q7", "seven")]), skip=False)
        text = str(refused.value)
        assert text.startswith("4 images and 1 prompt cannot be scored: ")
        assert text.count("no prompt has this name as its id; a fitting one is q7.png") == 1

    def test_images_that_a_manifest_does_not_list_are_bad(self, folder: Path) -> None:
        rows = [{"image": "p0.png", "prompt": "a, b"}, {"image": "p0_1.jpg", "prompt": 'say "x"'}]
        pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
        for path, bad in ((folder / "manifest.csv", set()), (folder, {"p0_a", "sub/p1_x"})):
            source = read_source(path)
            assert [item.prompt for item in source.items] == ["a, b", 'say "x"']
            assert dict(source.bad).keys() == bad

    def test_all_bad_rows_are_reported(self, folder: Path) -> None:
        rows = [
            {"image": "p0.png", "prompt": "x", "id": "same"},
            {"image": "p0_1.jpg", "prompt": "y", "id": "same"},
            {"image": "gone.png", "prompt": "z", "id": "missing"},
            {"image": "p0_a.png", "prompt": " ", "id": "empty"},
        ]
        path = folder / "m.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = read_source(path)
        reasons = dict(source.bad)
        assert reasons["same"].startswith("duplicate id (2 times")
        assert "gone.png" in reasons["missing"]
        assert reasons["empty"] == "empty prompt"
        with pytest.raises(UserError, match="nothing can be scored"):
            refuse_bad(source, skip=True)

    def test_rows_that_say_too_little_are_bad(self, folder: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"image": "p0.png", "prompt": ["a", "b"]},
            {"image": "p0_1.jpg"},
            {"prompt": "no image"},
            {"image": "p0_a.png", "prompt": "\ud83d"},
            {"image": "sub/p1_x.webp", "prompt": "fine", "id": 0, "prompt_id": 0},
            {"image": "p0.png", "prompt": "same", "id": 1},
            {"image": "p0_1.jpg", "prompt": "same", "id": 2},
            *(
                {"image": "p0.png", "prompt": "odd", key: value}
                for key, value in (("prompt_id", float("nan")), ("id", True), ("style", {}))
            ),
        ]
        path = folder / "M.JSONL"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = read_source(path)
        assert len(source.bad) == 7
        assert [reason.split(": ")[1] for _, reason in source.bad[-3:]] == [
            f"'{key}' is neither text nor a number" for key in ("prompt_id", "id", "style")
        ]
        item, one, two = source.items
        assert (item.id, item.prompt_id, item.name) == ("0", "0", "sub/p1_x.webp")
        assert one.prompt_id == two.prompt_id  # equal prompts belong together

    def test_paths_of_any_unicode_form_and_depth_are_found(self, tmp_path: Path) -> None:
        parts = [normalize(form, "données") for form in ("NFC", "NFD")] * 12
        image = tmp_path.joinpath(*parts, "é.png")
        image.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(image)
        rows = [
            {"image": "/".join([normalize("NFC", part) for part in parts] + ["é.png"])},
            {"image": "\\".join([normalize("NFD", part) for part in parts] + ["é.png"])},
            {"image": "/".join([*parts[:-1], "donnees", "é.png"])},
        ]
        path = tmp_path / "manifest.jsonl"
        path.write_text("".join(json.dumps(row | {"prompt": "p"}) + "\n" for row in rows))
        source = read_source(path)
        assert [item.image for item in source.items] == [image, image]
        assert "no such image" in source.bad[0][1]

    def test_what_is_hidden_or_unreadable(self, folder: Path) -> None:
        for name in (".ipynb_checkpoints/p1.png", "__MACOSX/p1.png"):
            (folder / name).parent.mkdir()
            Image.new("RGB", (8, 8)).save(folder / name)
        (folder / "p1.HEIC").write_bytes(b"heic")
        (folder / "p0.txt").write_bytes("é".encode("latin-1"))
        reasons = dict(read_source(folder).bad)
        assert reasons.keys() == {"p0", "p0_1", "p0_a", "sub/p1_x", "p1.HEIC"}
        assert "p0.txt, line 1: not UTF-8 text (it may be Windows-1252" in reasons["p0"]

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such folder"):
            read_source(tmp_path / "none")
        with pytest.raises(UserError, match="no images to score"):
            read_source(tmp_path)


def test_the_summary_averages_a_prompts_images_first(items: list[Item], tmp_path: Path) -> None:
    scores = Scorer(tmp_path / "journal", items).score("light", Brightness())
    lines = summary.summarise(scores)
    total = next(line for line in lines if (line.reward, line.style) == ("light", None))
    assert (total.images, total.prompts) == (10, 5)
    own = scores[scores["reward"] == "light"]
    means = [own[own["prompt_id"] == f"p{i}"]["score"].astype(float).mean() for i in range(5)]
    assert total.mean == pytest.approx(np.mean(means))
    assert total.interval == "checkpoint"
    assert total.low < total.mean < total.high
    assert {line.style for line in lines} == {None, "a", "b"}
    assert len(summary.as_frame(lines)) == 9


ODD = (
    "=1+1",
    "+49, @home -1",
    'say "hi", twice\nand\tonce, \\ more',
    "a \r return",
    "猫 🐈‍⬛ café cafe\u0301 \u2028 line",
    "NA",
    "word " * 499 + "word",
    "'quoted",
)


def test_programs_read_the_csv_as_the_parquet(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (1, 2, 4)).save(tmp_path / "one.png")
    ids = [f"00{number}" for number in range(len(ODD))]
    made = [
        Item(f"{prompt_id}_0", tmp_path / "one.png", prompt, prompt_id, style, f"{prompt_id}.png")
        for prompt_id, prompt, style in zip(ids, ODD, ["=a", None] * (len(ODD) // 2), strict=True)
    ]
    scores = Scorer(tmp_path / "journal", made).score("light", Brightness())
    scores.to_parquet(tmp_path / "scores.parquet", index=False)
    text = summary.exact_csv(scores)
    (tmp_path / "scores.csv").write_bytes(text.encode())
    known = pd.read_parquet(tmp_path / "scores.parquet")
    read = pd.read_csv(
        tmp_path / "scores.csv",
        dtype={name: str for name in COLUMNS if name != "score"},
        keep_default_na=False,
        float_precision="round_trip",
    )
    assert read["score"].tolist() == known["score"].astype(float).tolist()
    read["score"] = read["score"].astype(np.float32)
    known = known.fillna({"style": "", "template_hash": ""})
    pd.testing.assert_frame_equal(read.astype(object), known.astype(object))
    # Python's own reader, which takes every mark at its word.
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert [row[2] for row in rows[1 : len(ODD) + 1]] == list(ODD)
    assert text.count("\r\n") == len(rows)
    lines = summary.as_records(summary.summarise(scores))
    assert json.loads(json.dumps(lines, allow_nan=False)) == lines
