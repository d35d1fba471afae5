"""HPSv3 on tiny random weights: its question, its files and what they may get wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_vlm import build_small_hpsv3
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.qwen_files import CONTROL
from g2rpo.errors import UserError
from g2rpo.hub.cache import repository_folder
from g2rpo.hub.catalogue import catalogue
from g2rpo.rewards import hpsv3
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.rewards.unified_reward.template import BESIDE_THE_MODEL

pytestmark = pytest.mark.usefixtures("small_hpsv3_images")
IMAGES = [torch.full((40, 60, 3), value, dtype=torch.uint8) for value in (0, 128, 255)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_hpsv3(tmp_path_factory.mktemp("built") / "hpsv3")


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "hpsv3"))


def load(folder: Path, variant: str = "float32") -> hpsv3.HPSv3:
    config = RewardConfig(model="hpsv3", source=str(folder), variant=variant)
    reward = load_reward(config, "cpu")
    assert isinstance(reward, hpsv3.HPSv3)
    return reward


def score(reward: hpsv3.HPSv3, prompt: str) -> Tensor:
    return reward.score(IMAGES[:1], [prompt])


class TestPrompts:
    def test_are_scored_whole(self, built: Path) -> None:
        reward, long = load(built), "a red square, " * 150
        assert reward.too_long([long]) == [False]
        assert score(reward, long + "cat") != score(reward, long + "dog")

    def test_control_tokens_in_a_prompt_are_plain_text(self, built: Path) -> None:
        reward, prompt = load(built), " ".join(CONTROL)
        tokenizer = reward.inputs.tokenizer
        asked, plainly = (
            reward.prepare(IMAGES[:1], [text])["input_ids"][0] for text in (prompt, "a cat")
        )
        for token in tokenizer.convert_tokens_to_ids(CONTROL):
            assert (asked == token).sum() == (plainly == token).sum()
        assert prompt in tokenizer.decode(asked)

    def test_the_score_is_at_the_questions_own_reward_token(self, built: Path) -> None:
        """A prompt with the token is another prompt, and not where the score is read."""
        reward = load(built)
        words = f"cat {hpsv3.REWARD_TOKEN} dog"
        prepared = reward.prepare(IMAGES[:1], [words])
        places = (prepared["input_ids"][0] == reward.reward_token).nonzero().flatten()
        assert len(places) == 2
        with torch.no_grad():
            length = prepared["input_ids"].shape[1]
            hidden = reward.network.model(
                **prepared, position_ids=torch.arange(length).expand(3, 1, length)
            ).last_hidden_state
            expected = reward.network.rm_head(hidden[0, places[1]])[0]
        torch.testing.assert_close(score(reward, words)[0], expected)


def test_its_precision_is_in_its_version(built: Path) -> None:
    published = load_reward(RewardConfig(model="hpsv3", source=str(built)), "cpu")
    exact = load(built)
    assert (published.version, exact.version) == ("v3-bfloat16", "v3-float32")
    assert published.weights_hash == exact.weights_hash
    assert isinstance(published, hpsv3.HPSv3)
    assert {p.dtype for p in published.network.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in published.network.rm_head.parameters()} == {torch.float32}
    scores = [reward.score(IMAGES, ["a", "b", "c"]) for reward in (published, exact)]
    torch.testing.assert_close(*scores, atol=0.1, rtol=0)


def test_offloaded_scores_are_the_same(built: Path) -> None:
    reward = load(built)
    assert reward.networks() == [reward.network]
    before = score(reward, "a cat")
    reward.offload()
    assert torch.equal(score(reward, "a cat"), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rm_head.5.weight": None}, r"rm_head\.5\.weight is missing"),
        ({"visual.merger.ln_q.bias": None}, r"model\.visual\.merger\.ln_q\.bias is missing"),
        ({"rm_head.7.weight": torch.ones(2)}, r"rm_head\.7\.weight is unknown"),
        ({"rm_head.0.weight": torch.ones(1024, 32)}, r"rm_head\.0\.weight has shape"),
        ({"model.embed_tokens.weight": torch.ones(300, 64)}, r"embed_tokens\.weight has shape"),
    ],
)
def test_other_weights_are_refused(
    folder: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state: dict[str, Any] = safetensors.torch.load_file(folder / hpsv3.WEIGHTS) | change
    kept = {key: value for key, value in state.items() if value is not None}
    safetensors.torch.save_file(kept, folder / hpsv3.WEIGHTS)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_files_of_another_model_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    with pytest.raises(UserError, match=r"config\.json is not that of Qwen2-VL"):
        load(folder)


def test_the_question_must_contain_the_reward_token(folder: Path) -> None:
    before = score(load(folder), "a cat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [hpsv3.REWARD_TOKEN]})
    tokenizer.save_pretrained(folder)
    assert torch.equal(score(load(folder), "a cat"), before)
    (folder / BESIDE_THE_MODEL).write_text("How good is this {prompt}?")
    with pytest.raises(UserError, match=r"must contain <\|Reward\|> once"):
        load(folder)


def test_an_image_too_narrow_for_the_model_is_refused(built: Path) -> None:
    with pytest.raises(UserError, match="image of 2 x 500 pixels for 'a line': absolute aspect"):
        load(built).score([torch.zeros(500, 2, 3, dtype=torch.uint8)], ["a line"])


class TestPublishedQuestion:
    """The text in the authors' code; this one is ours, built like theirs."""

    CODE = """
import nothing_that_exists
INSTRUCTION = \"\"\"
Rate it.
Textual prompt - {text_prompt}

\"\"\"
prompt_with_special_token = "The rating: <|Reward|>\\n"
other = 3
"""

    def test_is_read_and_not_run(self, tmp_path: Path) -> None:
        path = tmp_path / "code.py"
        path.write_text(self.CODE)
        template = hpsv3.published_question(path)
        assert template.text == (
            "\nRate it.\nTextual prompt - {prompt}\n\nThe rating: <|Reward|>\n"
        )
        assert template.question("{a} cat").count("{a} cat") == 1

    @pytest.mark.parametrize(
        ("code", "message"),
        [("a = (", "cannot be parsed"), ("INSTRUCTION = 'x'", "no text 'prompt_with_special")],
    )
    def test_other_code_is_refused(self, tmp_path: Path, code: str, message: str) -> None:
        path = tmp_path / "code.py"
        path.write_text(code)
        with pytest.raises(UserError, match=message):
            hpsv3.published_question(path)

    def test_it_must_be_fetched_unless_it_is_beside_the_model(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("G2RPO_CACHE", str(tmp_path))
        beside = load(folder)
        (folder / BESIDE_THE_MODEL).unlink()
        with pytest.raises(UserError, match="not in the cache; run `g2rpo weights fetch hpsv3-qu"):
            load(folder)
        (artifact,) = catalogue().select([hpsv3.QUESTION_ARTIFACT], ("reward",))
        (file,) = artifact.files
        path = repository_folder(artifact) / str(artifact.revision) / file.path
        path.parent.mkdir(parents=True)
        path.write_text(self.CODE)
        reward = load(folder)
        assert reward.template == hpsv3.published_question(path)
        assert (
            len(reward.template_hash or "") == 64 and reward.template_hash != beside.template_hash
        )


def test_published_weights_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="weights fetch hpsv3-question"):
        load_reward(RewardConfig(model="hpsv3"), "cpu")
    with pytest.raises(UserError, match="unknown variant 'float16'; did you mean 'bfloat16'"):
        load_reward(RewardConfig(model="hpsv3", variant="float16"), "cpu")
