"""UnifiedReward in this process: a tiny random Qwen2.5-VL, scripted answers, and the cache."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_vlm import build_small_vlm
from torch import Tensor

from benchmarks.qwen_files import CONTROL
from g2rpo.errors import UserError
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.question import QuestionConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.rewards.unified_reward.local import hash_files
from g2rpo.rewards.unified_reward.reward import UnifiedReward, answer_key, answers_folder
from g2rpo.rewards.unified_reward.template import choose_template


def plain(red: int, green: int, blue: int, height: int = 40, width: int = 40) -> Tensor:
    colour = torch.tensor([red, green, blue], dtype=torch.uint8)
    return colour.expand(height, width, 3).contiguous()


def written(alignment: float, coherence: float, style: float) -> str:
    scores = {"Alignment": alignment, "Coherence": coherence, "Style": style}
    return "\n".join(f"{aspect} Score (1-5): {score:g}" for aspect, score in scores.items())


# The first two differ only in their images.
IMAGES = [plain(220, 30, 30), plain(30, 30, 220, 60, 40), plain(30, 220, 30, 40, 80)]
PROMPTS = ["a red square", "a red square", "a much longer caption: a field"]
ANSWERS = [written(4.5, 3, 5), written(1, 2.5, 4.5), written(5, 1, 3)]
EXPECTED = torch.tensor([[12.5, 4.5, 3, 5], [8, 1, 2.5, 4.5], [9, 5, 1, 3]])
EXPECTED[:, 0] /= 3


@pytest.fixture(autouse=True)
def _cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("G2RPO_CACHE", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_vlm(tmp_path_factory.mktemp("random") / "vlm")


class Scripted:
    """A backend with known answers, which records the number of questions of each call."""

    model, weights_hash = "scripted", "0" * 64

    def __init__(self, config: QuestionConfig) -> None:
        self.settings: dict[str, Any] = {"max_answer_tokens": config.max_answer_tokens}
        self.asked: list[int] = []

    def prepare(self, images: Sequence[Tensor], questions: Sequence[str]) -> list[str]:
        return [
            next(
                answer
                for known, prompt, answer in zip(IMAGES, PROMPTS, ANSWERS, strict=True)
                if prompt in question and torch.equal(image, known)
            )
            for image, question in zip(images, questions, strict=True)
        ]

    def ask(self, inputs: list[str]) -> list[str]:
        self.asked.append(len(inputs))
        return inputs


def scripted(**question: Any) -> tuple[UnifiedReward, Scripted]:
    config = QuestionConfig.model_validate({"template": "own", **question})
    backend = Scripted(config)
    template = choose_template(config, "scripted")
    return UnifiedReward(backend, template, config, "cpu", batch_size=32), backend


def load(folder: Path, **question: Any) -> UnifiedReward:
    config = {"model": "unified_reward", "source": str(folder), "question": question}
    reward = load_reward(RewardConfig.model_validate(config), "cpu")
    assert isinstance(reward, UnifiedReward)
    return reward


def ask(reward: UnifiedReward, images: list[Tensor], prompts: list[str]) -> list[str]:
    return reward.backend.ask(reward.prepare(images, prompts).inputs)


def scores(reward: UnifiedReward, order: list[int]) -> Tensor:
    prompts = [PROMPTS[i] for i in order]
    return reward.score_prepared(reward.prepare([IMAGES[i] for i in order], prompts), prompts)


class TestGeneration:
    @pytest.mark.parametrize("penalty", [1.0, 1.5])
    def test_batched_equals_single(self, folder: Path, tmp_path: Path, penalty: float) -> None:
        folder = Path(shutil.copytree(folder, tmp_path / "vlm"))
        settings = json.loads((folder / "generation_config.json").read_text())
        # As published checkpoints have it; sampling must not come of it.
        settings |= {"repetition_penalty": penalty, "do_sample": True, "temperature": 1.5}
        (folder / "generation_config.json").write_text(json.dumps(settings))
        reward = load(folder, max_answer_tokens=24, cache=False)
        draws = torch.Generator().manual_seed(1)
        sizes = [(28, 28), (64, 40), (90, 30), (33, 80), (50, 50), (112, 112)]
        images = [
            torch.randint(0, 256, (*size, 3), generator=draws, dtype=torch.uint8) for size in sizes
        ]
        prompts = ["a", "a cat " * 9, "x" * 40, "ein Kätzchen, 猫", '{prompt} "q"\n', "b c"]
        together = ask(reward, images, prompts)
        alone = [ask(reward, [i], [p])[0] for i, p in zip(images, prompts, strict=True)]
        assert together == alone
        assert len(set(together)) == len(together) and all(together)
        # A repetition penalty counts the question's tokens, padding included: no new one is there.
        padded = reward.prepare(images, prompts).inputs["input_ids"]
        for row, image, prompt in zip(padded, images, prompts, strict=True):
            plainly = reward.prepare([image], [prompt]).inputs["input_ids"]
            assert set(row.tolist()) == set(plainly[0].tolist())

    def test_answers_are_of_the_configured_length(self, folder: Path) -> None:
        short = ask(load(folder, max_answer_tokens=3), IMAGES[:1], PROMPTS[:1])[0]
        longer = ask(load(folder, max_answer_tokens=9), IMAGES[:1], PROMPTS[:1])[0]
        assert longer.startswith(short.rstrip("\ufffd")) and len(longer) > len(short)

    def test_prepare_is_thread_safe(self, folder: Path) -> None:
        reward = load(folder, cache=False)
        orders = [[0], [1, 2], [2, 0, 1], [1]] * 4

        def one(order: list[int]) -> dict[str, Tensor]:
            prepared = reward.prepare([IMAGES[i] for i in order], [PROMPTS[i] for i in order])
            return dict(prepared.inputs)

        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(one, orders))
        for order, inputs in zip(orders, together, strict=True):
            expected = one(order)
            assert inputs.keys() == expected.keys()
            assert all(torch.equal(inputs[name], expected[name]) for name in expected)


class TestScores:
    def test_batches_and_order_do_not_matter(self) -> None:
        reward, _ = scripted(cache=False)
        order = [2, 0, 1, 1, 0]
        together = scores(reward, order)
        torch.testing.assert_close(together, EXPECTED[order], atol=1e-6, rtol=0)
        reward.batch_size = 2
        prompts = [PROMPTS[i] for i in order]
        assert torch.equal(reward.score([IMAGES[i] for i in order], prompts), together[:, 0])
        assert reward.score([], []).shape == (0,)
        assert reward.columns == (
            "unified_reward",
            "unified_reward.alignment",
            "unified_reward.coherence",
            "unified_reward.style",
        )

    @pytest.mark.parametrize(
        ("aggregate", "weights"),
        [
            ("alignment", (1, 0, 0)),
            ("coherence", (0, 1, 0)),
            ("style", (0, 0, 1)),
            ({"alignment": 3, "style": 1}, (0.75, 0, 0.25)),
        ],
    )
    def test_aggregates(self, aggregate: Any, weights: tuple[float, ...]) -> None:
        found = scores(scripted(aggregate=aggregate)[0], [0, 1, 2])
        torch.testing.assert_close(found[:, 0], EXPECTED[:, 1:] @ torch.tensor(weights).float())
        assert torch.equal(found[:, 1:], EXPECTED[:, 1:])

    def test_names_what_was_measured(self, folder: Path) -> None:
        reward = load(folder, aggregate="style")
        assert (reward.name, reward.version) == ("unified_reward", "vlm-style")
        assert reward.weights_hash == hash_files(folder, ("model.safetensors",))
        assert len(reward.template_hash or "") == 64
        assert load(folder, template="own").template_hash != reward.template_hash
        assert reward.backend.settings["dtype"] == "float32"
        low = load(folder, dtype="bfloat16")
        assert next(low.backend.network.parameters()).dtype == torch.bfloat16  # type: ignore[attr-defined]

    def test_an_answer_without_scores_is_refused(self, folder: Path) -> None:
        reward = load(folder, max_answer_tokens=100)
        with pytest.raises(UserError, match="no score for") as caught:
            reward.score(IMAGES[:1], ["a red square"])
        message = str(caught.value)
        assert "'a red square'" in message and "\n" not in message
        assert len(message) < 200 + 350
        assert not list(answers_folder().rglob("*.json"))

    def test_control_tokens_in_a_prompt_are_plain_text(self, folder: Path) -> None:
        reward, prompt = load(folder), " ".join(CONTROL)
        tokenizer = reward.backend.processor.tokenizer  # type: ignore[attr-defined]
        control = tokenizer.convert_tokens_to_ids(CONTROL)
        asked, plainly = (
            reward.prepare(IMAGES[:1], [text]).inputs["input_ids"][0] for text in (prompt, "a cat")
        )
        assert [int((asked == token).sum()) for token in control] == [
            int((plainly == token).sum()) for token in control
        ]
        assert prompt in tokenizer.decode(asked)


class TestCache:
    def test_a_known_answer_is_not_asked_again(self, tmp_path: Path) -> None:
        first = scores(scripted()[0], [0, 1])
        assert len(list((tmp_path / "cache" / "g2rpo" / "answers").rglob("*.json"))) == 2
        again, backend = scripted()
        assert torch.equal(scores(again, [1, 0]), first[[1, 0]])
        assert backend.asked == []
        torch.testing.assert_close(scores(again, [1, 2, 0]), EXPECTED[[1, 2, 0]])
        assert backend.asked == [1]

    def test_can_be_switched_off_and_moved(self, tmp_path: Path) -> None:
        scores(scripted(cache=False)[0], [0])
        assert not (tmp_path / "cache").exists()
        scores(scripted(cache_folder=str(tmp_path / "mine"))[0], [0])
        assert len(list((tmp_path / "mine").rglob("*.json"))) == 1
        assert not (tmp_path / "cache").exists()
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"file/in: cannot cache answers .*cache_folder"):
            scores(scripted(cache_folder=str(tmp_path / "file" / "in"))[0], [0])

    def test_damaged_and_malformed_entries_are_asked_again(self) -> None:
        scores(scripted()[0], [0])
        entry = next(answers_folder().rglob("*.json"))
        whole = entry.read_text()
        for damage in ("", whole[:20], "[1]", '{"answer": 3}', '{"answer": "no scores"}'):
            entry.write_text(damage)
            torch.testing.assert_close(scores(scripted()[0], [0]), EXPECTED[[0]])
            assert entry.read_text() == whole

    def test_a_key_covers_everything_that_affects_an_answer(self) -> None:
        image, asked = plain(1, 2, 3), {"model": "m", "template": "t", "settings": {"a": 1}}
        other = image.clone()
        other[0, 0, 0] = 2
        keys = {
            answer_key(image, "p", asked),
            answer_key(other, "p", asked),
            answer_key(image.reshape(20, 80, 3), "p", asked),
            answer_key(image, "q", asked),
            *(answer_key(image, "p", asked | {key: "x"}) for key in asked),
        }
        assert len(keys) == 4 + len(asked)
        assert answer_key(image.clone(), "p", dict(asked)) in keys

        def key(**question: Any) -> list[str]:
            return scripted(**question)[0].prepare(IMAGES[:1], PROMPTS[:1]).keys

        assert key() != key(max_answer_tokens=99)
        assert key() == key(aggregate="style")  # the same answer has all aggregates

    def test_the_default_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert answers_folder() == tmp_path / "cache" / "g2rpo" / "answers"
        for value in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            assert answers_folder() == Path.home() / ".cache" / "g2rpo" / "answers"
        monkeypatch.setenv("G2RPO_CACHE", str(tmp_path / "own"))
        assert answers_folder() == tmp_path / "own" / "answers"


class TestLoading:
    def test_missing_files_are_named(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such folder"):
            load(tmp_path / "nowhere")
        with pytest.raises(UserError, match=r"has no config\.json"):
            load(tmp_path)
        folder = Path(shutil.copytree(folder, tmp_path / "vlm"))
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"has no \*\.safetensors"):
            load(folder)

    def test_damaged_weights_are_refused(self, folder: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(folder, tmp_path / "vlm"))
        weights = folder / "model.safetensors"
        whole = safetensors.torch.load_file(weights)
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(UserError, match="vlm: cannot be loaded"):
            load(folder)
        for change in ("missing", "shape"):
            state = dict(whole)
            name = "lm_head.weight"
            if change == "missing":
                del state[name]
            else:
                state[name] = state[name][:-1].contiguous()
            safetensors.torch.save_file(state, weights, metadata={"format": "pt"})
            with pytest.raises(UserError, match=r"vlm: .*lm_head"):
                load(folder)

    @pytest.mark.parametrize(
        ("model_type", "message"),
        [
            ("qwen3_vl", "do not fit config"),
            ("bert", r"'bert'; .*question\.server"),
            (None, r"None; .*question\.server"),
        ],
    )
    def test_another_architecture_is_refused(
        self, folder: Path, tmp_path: Path, model_type: str | None, message: str
    ) -> None:
        folder = Path(shutil.copytree(folder, tmp_path / "vlm"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        with pytest.raises(UserError, match=message):
            load(folder)

    def test_a_tokenizer_of_another_model_is_refused(self, folder: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(folder, tmp_path / "vlm"))
        (folder / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=r"tokeni[sz]er|processor"):
            load(folder)

    def test_a_hub_id_that_cannot_be_fetched(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        config = {"model": "unified_reward", "question": {"template": "own"}}
        with pytest.raises(UserError, match=r"cannot fetch CodeGoat24/.*hf download"):
            load_reward(RewardConfig.model_validate(config), "cpu")
