"""The height and width of images: how they are written, what is refused, and their hashes."""

from pathlib import Path
from typing import Any

import pytest
from command_line import write_small_profile
from hypothesis import given, strategies

from benchmarks.evaluation.protocol import EvaluationConfig
from g2rpo.config import content_hash, merge, parse_overrides, validate
from g2rpo.errors import UserError
from g2rpo.policy.config import ImageConfig, PolicyConfig
from g2rpo.training.config import PicturesConfig
from reproduce.experiment import load_experiment, load_profile, resolve
from reproduce.experiment.fingerprint import evaluation_inputs, train_run_name
from reproduce.experiment.resolving import given as as_written

KINDS: dict[type[ImageConfig], dict[str, Any]] = {
    PolicyConfig: {"source": "policy"},
    EvaluationConfig: {"name": "protocol"},
    PicturesConfig: {"file": "prompts.txt"},
}
SIDES = strategies.none() | strategies.integers(1, 3).map(lambda side: 16 * side)


@pytest.mark.parametrize("kind", KINDS)
@given(resolution=strategies.integers(1, 3).map(lambda side: 16 * side), height=SIDES, width=SIDES)
def test_one_size_has_one_dump(
    kind: type[ImageConfig], resolution: int, height: int | None, width: int | None
) -> None:
    written = {"resolution": resolution, "height": height, "width": width}
    config = kind.model_validate(KINDS[kind] | written)
    size = (resolution if height is None else height, resolution if width is None else width)
    assert config.size == size
    assert config.pixels == size[0] * size[1]
    dump = config.model_dump(mode="json")
    plain = kind.model_validate(KINDS[kind] | {"height": size[0], "width": size[1]})
    assert plain.model_dump(mode="json") == dump
    assert kind.model_validate(dump).model_dump(mode="json") == dump
    assert kind.model_validate(dump).size == size
    shown = {key: value for key, value in dump.items() if key in written}
    if size[0] == size[1]:
        assert shown == {"resolution": size[0]}
    else:
        assert shown == {"height": size[0], "width": size[1]}


def test_square_images_are_dumped_as_before_there_were_others() -> None:
    policy = PolicyConfig(source="policy", resolution=720)
    assert policy.model_dump(mode="json") == {
        "source": "policy", "revision": None, "resolution": 720, "guidance_scale": 3.5,
        "max_sequence_length": 512, "dtype": "float32",
    }  # fmt: skip
    assert EvaluationConfig(name="protocol").model_dump(mode="json") == {
        "name": "protocol", "split": "test", "limit": None, "seed": 1223627, "resolution": 1024,
        "guidance_scale": 3.5,
        "grid": {"steps": 50, "schedule": "flux_dynamic", "shift": 3.0, "timestep": "exact"},
    }  # fmt: skip
    assert EvaluationConfig(name="protocol", width=512).size == (1024, 512)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"resolution": 0}, "resolution: input should be greater than 0 (found 0)"),
        ({"height": -16}, "height: input should be greater than 0 (found -16)"),
        ({"width": 0}, "width: input should be greater than 0 (found 0)"),
        ({"width": 48.0}, "width: input should be a valid integer (found 48.0; write 48)"),
        ({"resolution": [32, 48]}, "resolution: one number, for square images; for others, set"),
        ({"resolution": None}, "set resolution, or height and width"),
        ({"resolution": None, "width": 32}, "set resolution, or height and width"),
        ({"hight": 32}, "unknown key 'hight'; did you mean 'height'?"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_size_is_told_in_one_line(
    kind: type[ImageConfig], change: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as caught:
        validate(kind, KINDS[kind] | {"resolution": 32} | change, "file.yaml")
    assert str(caught.value).startswith(f"file.yaml: {told}")
    assert "\n" not in str(caught.value)


def test_a_layer_of_settings_keeps_what_was_written() -> None:
    profile = PolicyConfig(source="policy", resolution=720, height=512)
    assert as_written(profile) == {"source": "policy", "resolution": 720, "height": 512}
    for change, size in (
        ({"width": 640}, (512, 640)),
        ({"resolution": 1024}, (512, 1024)),
        ({"height": None}, (720, 720)),
    ):
        merged = merge(as_written(profile), change)
        assert PolicyConfig.model_validate(merged).size == size
    moved = profile.at(EvaluationConfig(name="protocol", width=48, guidance_scale=1.0))
    assert (moved.size, moved.guidance_scale, moved.source) == ((1024, 48), 1.0, "policy")


def names(profile: Path, *overrides: str) -> tuple[str, str]:
    """The names of a cell's run and of its evaluation."""
    experiment, loaded = load_experiment("table1"), load_profile(str(profile))
    cell = resolve(experiment, loaded, "hps/g2rpo", 1, parse_overrides(overrides))
    assert cell.train is not None
    return train_run_name(cell.train), content_hash(evaluation_inputs(cell))


def test_a_size_that_is_written_otherwise_names_the_same_run(
    smoke_assets: Path, tmp_path: Path
) -> None:
    base = write_small_profile(tmp_path / "small.yaml", smoke_assets)
    found = {
        written: names(base, *(f"policy.{each}" for each in written.split()))
        for written in (
            "resolution=32", "height=32", "resolution=64 height=32 width=32",
            "width=48", "resolution=48 height=32", "resolution=8 height=32 width=48",
            "height=48",
        )
    }  # fmt: skip
    runs = {written: run for written, (run, _) in found.items()}
    square, wide, tall = list(runs.values())[:3], list(runs.values())[3:6], runs["height=48"]
    assert len(set(square)) == len(set(wide)) == 1
    assert len({square[0], wide[0], tall}) == 3
    assert square[0] == names(base)[0]
    evaluations = {evaluation for _, evaluation in found.values()}
    assert evaluations == {names(base)[1]}  # an override is of the training alone
    extended = tmp_path / "wide.yaml"
    extended.write_text(
        f"name: wide\nextends: {base}\npolicy: {{width: 48}}\nevaluation: {{width: 48}}\n"
    )
    run, evaluation = names(extended)
    assert run == wide[0]
    assert evaluation not in evaluations
    profile = load_profile(str(extended))
    assert profile.policy.size == profile.evaluation.size == (32, 48)
