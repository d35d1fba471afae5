"""Diversity against closed forms and plain loops, and the features it is measured in."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from benchmarks.evaluation.diversity import mean_pairwise_distance, measure_diversity, vendi_score
from benchmarks.evaluation.metrics import DISTANCE, VENDI
from g2rpo.errors import UserError
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.image_tower import ImageTower
from g2rpo.rewards.registry import load_reward

# Away from zero, where a row would have no direction.
FEATURES = st.tuples(st.integers(2, 8), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(0.125, 8) | st.floats(-8, -0.125))
)


@pytest.mark.parametrize("count", [2, 7])
def test_identical_images_count_as_one_and_orthonormal_ones_each(count: int) -> None:
    features = np.tile(np.array([[0.3, -1.7, 2.2]]), (count, 1))
    assert vendi_score(features) == pytest.approx(1, abs=1e-12)
    assert mean_pairwise_distance(features) == pytest.approx(0, abs=1e-15)
    rotation, _ = np.linalg.qr(np.random.default_rng(count).normal(size=(count + 3, count)))
    assert vendi_score(rotation.T) == pytest.approx(count, rel=1e-12)
    assert mean_pairwise_distance(rotation.T) == pytest.approx(1, rel=1e-12)


@given(st.floats(0, math.pi))
def test_two_images_follow_the_closed_form(angle: float) -> None:
    features = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    # K / 2 has the eigenvalues (1 +- cos) / 2.
    shares = [(1 + math.cos(angle)) / 2, (1 - math.cos(angle)) / 2]
    entropy = -sum(share * math.log(share) for share in shares if share > 1e-15)
    assert vendi_score(features) == pytest.approx(math.exp(entropy), abs=1e-9)
    assert mean_pairwise_distance(features) == pytest.approx(1 - math.cos(angle), abs=1e-12)


@given(FEATURES, st.integers(0, 2**32 - 1))
def test_order_and_length_do_not_matter(features: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(features))
    scaled = features[order] * np.linspace(0.5, 3, len(features))[:, None]
    assert vendi_score(scaled) == pytest.approx(vendi_score(features), rel=1e-9)
    distance = mean_pairwise_distance(features)
    assert mean_pairwise_distance(scaled) == pytest.approx(distance, abs=1e-12)


@given(FEATURES)
def test_the_distance_is_that_of_a_plain_loop(features: np.ndarray) -> None:
    total, pairs = 0.0, 0
    for i in range(len(features)):
        for j in range(i + 1, len(features)):
            dot = sum(float(a) * float(b) for a, b in zip(features[i], features[j], strict=True))
            lengths = [math.sqrt(sum(float(a) ** 2 for a in features[k])) for k in (i, j)]
            total += 1 - dot / (lengths[0] * lengths[1])
            pairs += 1
    assert mean_pairwise_distance(features) == pytest.approx(total / pairs, abs=1e-12)


def test_features_without_a_direction_are_refused() -> None:
    for features in ([[1.0, 0.0], [0.0, 0.0]], [[1.0], [math.nan]]):
        with pytest.raises(ValueError, match="zero or not finite"):
            vendi_score(features)
    with pytest.raises(ValueError, match="images >= 2"):
        mean_pairwise_distance([[1.0, 2.0]])


def load_tower(smoke_assets: Path, name: str, batch_size: int = 32) -> ImageTower:
    source = str(smoke_assets / "rewards" / name)
    model = load_reward(RewardConfig(model=name, source=source, batch_size=batch_size), "cpu")
    assert isinstance(model, ImageTower)
    return model


def pictures(count: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 32, 32, 3), generator=draws, dtype=torch.uint8)


def residual(matrix: torch.Tensor, scores: torch.Tensor) -> float:
    """What is left of ``scores`` [N] that no vector times ``matrix`` [N, D] gives."""
    solution = torch.linalg.lstsq(matrix, scores[:, None], driver="gelsd").solution
    return float((matrix @ solution - scores[:, None]).norm())


@pytest.mark.parametrize("name", ["clip", "hps", "pick_score"])
def test_features_are_those_that_the_score_is_made_of(smoke_assets: Path, name: str) -> None:
    model = load_tower(smoke_assets, name)
    features = model.image_features(pictures(5))
    assert features.shape[0] == 5
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert features.norm(dim=-1).numpy() == pytest.approx(np.ones(5), abs=1e-6)
    # The scores of many images and one prompt are their features times one vector.
    many = pictures(320)
    scores = model.score(many, ["a red circle on black"] * 320).double()
    matrix = model.image_features(many).double()
    assert matrix.shape[1] <= 160  # more would fit any scores
    assert residual(matrix, scores) < 1e-3 * residual(matrix, scores.roll(1))
    in_pairs = load_tower(smoke_assets, name, batch_size=2).image_features(pictures(5))
    assert in_pairs.numpy() == pytest.approx(features.numpy(), abs=1e-5)


def test_each_prompt_gets_both_measures(smoke_assets: Path, tmp_path: Path) -> None:
    images = pictures(5)
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.numpy()).save(path)
    tower = load_tower(smoke_assets, "clip")
    files = {"b": paths[:3], "a": [paths[3], paths[4], paths[4]]}
    found = measure_diversity(tower, files, "clip").set_index(["metric", "prompt_id"])["value"]
    assert found.dtype == np.float64
    for prompt, rows in {"b": [0, 1, 2], "a": [3, 4, 4]}.items():
        features = tower.image_features(images[rows]).double().numpy()
        assert found[DISTANCE, prompt] == pytest.approx(mean_pairwise_distance(features), rel=1e-9)
        assert found[VENDI, prompt] == pytest.approx(vendi_score(features), rel=1e-9)
    with pytest.raises(UserError, match=r"absent\.png"):
        measure_diversity(tower, {"a": [tmp_path / "absent.png", paths[0]]}, "clip")
