"""The reward models on tiny random weights: one protocol, same scores however they are batched."""

import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from small_aesthetic import build_small_aesthetic
from small_vlm import build_small_hpsv3
from torch import Tensor

from benchmarks.mini_world import world
from benchmarks.mini_world.tiny_models import build_tiny_models
from g2rpo.errors import UserError
from g2rpo.rewards.aesthetic import HEAD
from g2rpo.rewards.base import BatchedReward, RewardConfig, RewardModel
from g2rpo.rewards.preprocessing import Preprocessing
from g2rpo.rewards.registry import REWARDS, load_reward, reward_class

pytestmark = pytest.mark.usefixtures("small_hpsv3_images")
PROMPTS = world.make_captions(7, "train", 6) * 2
WEIGHTS = {
    "hps": "open_clip_model.safetensors",
    "clip": "open_clip_model.safetensors",
    "pick_score": "model.safetensors",
    "image_reward": "image_reward.safetensors",
    "attributes": "model.safetensors",
    "hpsv3": "HPSv3.safetensors",
    "aesthetic": "model.safetensors",
}
EXACT: dict[str, dict[str, object]] = {"hpsv3": {"variant": "float32"}}
"""Settings for scores that depend on the batch by float32 rounding alone."""


@pytest.fixture(scope="module")
def tiny(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "assets"
    shutil.copytree(smoke_assets, folder)
    build_small_hpsv3(folder / "rewards" / "hpsv3")
    build_small_aesthetic(folder / "rewards" / "aesthetic")
    return folder


@pytest.fixture(scope="module")
def models(tiny: Path) -> dict[str, RewardModel]:
    return {name: load(tiny, name) for name in WEIGHTS}


def load(tiny: Path, name: str, **changes: object) -> RewardModel:
    config = RewardConfig.model_validate(
        {"model": name, "source": str(tiny / "rewards" / name), **EXACT.get(name, {}), **changes}
    )
    return load_reward(config, "cpu")


def pictures(number: int = len(PROMPTS), height: int = 32, width: int = 32) -> Tensor:
    draws = torch.Generator().manual_seed(3)
    coarse = torch.randint(0, 256, (number, 3, 4, 4), generator=draws, dtype=torch.uint8)
    smooth = torch.nn.functional.interpolate(coarse.float(), (height, width), mode="bilinear")
    return smooth.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("name", WEIGHTS)
class TestEveryReward:
    def test_fulfils_the_protocol(self, models: dict[str, RewardModel], name: str) -> None:
        reward = models[name]
        scores = reward.score(pictures(), PROMPTS)
        assert scores.shape == (len(PROMPTS),)
        assert scores.dtype == torch.float32 and scores.device.type == "cpu"
        assert not scores.requires_grad
        assert reward.name == name
        assert reward.version
        assert len(reward.weights_hash) == 64
        assert reward.score(pictures()[:0], []).shape == (0,)

    def test_tells_images_and_prompts_apart(
        self, models: dict[str, RewardModel], name: str
    ) -> None:
        same_prompt = models[name].score(pictures(), [PROMPTS[0]] * len(PROMPTS))
        same_image = models[name].score(pictures()[:1].expand(len(PROMPTS), -1, -1, -1), PROMPTS)
        least = 0.0 if name == "attributes" else 1e-3
        assert same_prompt.std() > least
        assert same_image.std() > least or name == "aesthetic"

    def test_batches_and_sizes_do_not_matter(
        self, tiny: Path, models: dict[str, RewardModel], name: str
    ) -> None:
        sizes = [(32, 32), (20, 60), (64, 64), (90, 30)] * 3
        images = [pictures(1, *size)[0] for size in sizes]
        whole = models[name].score(images, PROMPTS)
        single = [
            models[name].score(image[None], [prompt])
            for image, prompt in zip(images, PROMPTS, strict=True)
        ]
        fives = load(tiny, name, batch_size=5).score(images, PROMPTS)
        torch.testing.assert_close(whole, torch.cat(single), atol=1e-5, rtol=0)
        torch.testing.assert_close(whole, fives, atol=1e-5, rtol=0)

    def test_damaged_or_missing_weights_are_refused(
        self, tiny: Path, tmp_path: Path, name: str
    ) -> None:
        folder = tmp_path / "rewards" / name
        shutil.copytree(tiny / "rewards" / name, folder)
        weights = folder / WEIGHTS[name]
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(UserError, match=name):
            load(tmp_path, name)
        weights.unlink()
        with pytest.raises(UserError, match=WEIGHTS[name].replace(".", r"\.")):
            load(tmp_path, name)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (pictures().float() / 255, PROMPTS, "uint8"),
        (pictures().permute(0, 3, 1, 2), PROMPTS, r"\[N, H, W, 3\]"),
        (pictures()[0], PROMPTS, r"\[N, H, W, 3\]"),
        (pictures(), PROMPTS[:-1], "12 images but 11 prompts"),
        (pictures(), [*PROMPTS[:-1], "  "], "prompt 11 is empty"),
        (pictures(), [*PROMPTS[:-1], "\ud800"], "prompt 11 is not valid Unicode"),
        (pictures(), PROMPTS[0], "list of strings"),
    ],
)
def test_malformed_input_is_refused(
    models: dict[str, RewardModel], images: Tensor, prompts: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        models["hps"].score(images, prompts)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("hps", "visual.proj"),
        ("clip", "text_projection"),
        ("pick_score", "visual_projection.weight"),
        ("image_reward", "mlp.layers.7.bias"),
        ("hpsv3", "rm_head.5.bias"),
        ("aesthetic", "visual_projection.weight"),
    ],
)
def test_a_score_that_is_not_finite_names_the_prompt(
    tiny: Path, tmp_path: Path, name: str, key: str
) -> None:
    shutil.copytree(tiny / "rewards" / name, tmp_path / "rewards" / name)
    weights = tmp_path / "rewards" / name / WEIGHTS[name]
    state = safetensors.torch.load_file(weights)
    state[key].view(-1)[0] = float("nan")
    safetensors.torch.save_file(state, weights)
    with pytest.raises(UserError, match="not finite") as caught:
        load(tmp_path, name).score(pictures(), PROMPTS)
    assert PROMPTS[0] in str(caught.value)


class Custom(BatchedReward):
    """A reward with a part, whose result the test sets."""

    name = "custom"
    part_names = ("style",)
    found: Any

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Any:
        """Forgets to return the reward."""

    def evaluate(self, prepared: Any) -> Tensor:
        return cast(Tensor, self.found)


@pytest.mark.parametrize(
    ("found", "given"),
    [
        (torch.zeros(2, 3), r"\(2, 3\)"),  # columns first
        (torch.zeros(6), r"\(6,\)"),
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(()), r"\(\)"),
        (np.zeros((3, 2)), "ndarray"),
        ([[0.1, 0.2]] * 3, "list"),
        (None, "NoneType"),
    ],
)
def test_scores_of_another_shape_are_refused(found: Any, given: str) -> None:
    reward = Custom("cpu", 4, "1", "none")
    reward.found = found
    message = rf"^custom: Custom.evaluate returned {given} for 3 images; return .* \[3, 2\]$"
    with pytest.raises(UserError, match=message):
        reward.score(pictures(3), PROMPTS[:3])
    reward.found = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert reward.score(pictures(3), PROMPTS[:3]).tolist() == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("place", ["g2rpo.rewards.typo:HPS", "g2rpo.rewards.hps:Typo", "hps"])
def test_a_wrong_line_of_the_registry_is_one_line(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, "mine", place)
    with pytest.raises(UserError, match=rf"^reward mine: cannot import '{place}' \(.*registry.py"):
        reward_class(RewardConfig(model="mine"))


class Unfinished(Custom):
    """A reward that does not score."""

    evaluate = BatchedReward.evaluate


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("g2rpo.rewards.hps", "is no subclass of BatchedReward; .* to module:Class"),
        ("pathlib:Path", "is no subclass of BatchedReward"),
        (f"{__name__}:Unfinished", "does not define evaluate"),
    ],
)
def test_what_is_no_whole_reward_is_one_line(
    place: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, "mine", place)
    with pytest.raises(UserError, match=rf"^reward mine: .*{message}"):
        reward_class(RewardConfig(model="mine"))


def test_a_reward_that_load_does_not_return_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "mine", f"{__name__}:Custom")
    with pytest.raises(UserError, match=r"^reward mine: Custom.load returned NoneType; return the"):
        load_reward(RewardConfig(model="mine"), "cpu")


@pytest.mark.parametrize("name", ["hps", "clip", "pick_score", "image_reward"])
def test_a_tokenizer_of_the_wrong_size_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "rewards" / name
    other = "image_reward" if name != "image_reward" else "hps"
    shutil.copytree(tiny / "rewards" / name, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / "rewards" / other / file, folder / file)
    with pytest.raises(UserError, match="tokens but the text model expects"):
        load(tmp_path, name)


def test_weights_of_another_architecture_are_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "rewards" / "hps", tmp_path / "rewards" / "hps")
    weights = tmp_path / "rewards" / "hps" / WEIGHTS["hps"]
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "logit_scale"}, weights)
    with pytest.raises(UserError, match="logit_scale is missing"):
        load(tmp_path, "hps")


@pytest.mark.parametrize("name", ["hps", "clip", "pick_score", "image_reward"])
def test_published_weights_that_are_not_there_say_how_to_get_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot fetch .*hf download .*set `source`"):
        load_reward(RewardConfig(model=name), "cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "hps", "source": "./nowhere"}, "no such folder"),
        ({"model": "pickscore"}, "did you mean 'pick_score'"),
        ({"model": "pick_score", "variant": "logits"}, "did you mean 'logit'"),
    ],
)
def test_wrong_names_are_refused(config: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(RewardConfig.model_validate(config), "cpu")


def test_pick_score_scales(tiny: Path) -> None:
    cosine = load(tiny, "pick_score")
    logit = load(tiny, "pick_score", variant="logit")
    weights = safetensors.torch.load_file(tiny / "rewards" / "pick_score" / "model.safetensors")
    expected = weights["logit_scale"].exp() * cosine.score(pictures(), PROMPTS)
    torch.testing.assert_close(logit.score(pictures(), PROMPTS), expected, atol=1e-5, rtol=1e-5)
    assert (cosine.version, logit.version) == ("v1-cosine", "v1-logit")
    for variant, of_logit in (("logit26", expected / 26), ("normalised", (expected - 18) / 8)):
        scores = load(tiny, "pick_score", variant=variant).score(pictures(), PROMPTS)
        torch.testing.assert_close(scores, of_logit, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"), [("hps", 22), ("clip", 22), ("pick_score", 22), ("image_reward", 33)]
)
def test_prompts_longer_than_the_context_are_reported(tiny: Path, name: str, words: int) -> None:
    model = load_reward(RewardConfig(model=name, source=str(tiny / "rewards" / name)), "cpu")
    fits, too_long = " ".join(["red"] * words), " ".join(["red"] * (words + 1))
    assert model.too_long([fits, too_long, "a circle"]) == [False, True, False]
    whole, cut = (
        model.score(pictures(1), [text])
        for text in (" ".join(["red"] * (words + 5)), " ".join(["red"] * (words + 9)))
    )
    torch.testing.assert_close(whole, cut)


def test_the_head_of_the_aesthetic_score_is_checked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny / "rewards" / "aesthetic", tmp_path / "rewards" / "aesthetic")
    path = tmp_path / "rewards" / "aesthetic" / f"{HEAD}.pth"
    state = torch.load(path, weights_only=True)
    for change, message in (
        ({"layers.7.bias": Path("code")}, "cannot read the weights .*fetch it again"),
        ({"layers.8.bias": torch.ones(1)}, "8.bias is unknown"),
        ({"layers.0.weight": torch.ones(1024, 64)}, "0.weight has shape"),
    ):
        torch.save(state | change, path)
        with pytest.raises(UserError, match=message):
            load(tmp_path, "aesthetic")
    path.unlink()
    with pytest.raises(UserError, match="weights fetch aesthetic-head"):
        load(tmp_path, "aesthetic")


class TestPreprocessing:
    @pytest.mark.parametrize("resize", ["shortest", "squash", "longest_padded"])
    def test_an_image_of_the_right_size_is_only_normalised(self, resize: str) -> None:
        images = pictures()
        prepared = Preprocessing(32, resize, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(images)  # type: ignore[arg-type]
        for channel, (mean, std) in enumerate(zip((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), strict=True)):
            expected = (images[..., channel].float() / 255 - mean) / std
            torch.testing.assert_close(prepared[:, channel], expected)

    def test_padding_is_black_and_on_both_sides(self) -> None:
        white = torch.full((1, 10, 20, 3), 255, dtype=torch.uint8)
        prepared = Preprocessing(40, "longest_padded", (0.0,) * 3, (1.0,) * 3)(white)
        assert prepared.shape == (1, 3, 40, 40)
        assert prepared[0, :, :10].abs().max() == 0 and prepared[0, :, 30:].abs().max() == 0
        torch.testing.assert_close(prepared[0, :, 10:30], torch.ones(3, 20, 40))


def test_tiny_models_are_built_once(tiny: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    build_tiny_models(tiny)
    assert before == {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
