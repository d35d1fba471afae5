"""Configuration: one line per mistake, naming the key; overrides; impossible combinations."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from g2rpo.config import (
    StrictModel,
    content_hash,
    load_yaml,
    merge,
    nearest,
    parse_overrides,
    validate,
)
from g2rpo.errors import UserError
from g2rpo.training.config import TrainConfig


class Leaf(StrictModel):
    width: int = 3
    label: str = "x"


class Branch(StrictModel):
    name: Literal["branch"] = "branch"
    height: float = 1.0


class Tree(StrictModel):
    leaf: Leaf = Leaf()
    needed: int
    maybe: Leaf | None = None
    many: tuple[Leaf, ...] = ()
    named: dict[str, dict[str, Leaf]] = Field(default_factory=dict)
    either: Leaf | Branch = Leaf()
    rate: float = 1.0
    flag: bool = False
    pair: tuple[int, ...] | None = None
    until: Literal["profile"] | float | None = None


def problem(model: type[StrictModel], data: Any, where: str = "file.yaml") -> str:
    with pytest.raises(UserError) as caught:
        validate(model, data, where)
    message = str(caught.value)
    assert message.startswith(f"{where}: ")
    assert "\n" not in message
    return message


# --- validation ----------------------------------------------------------------------------------


def test_the_nearest_name_is_the_first_of_equals_and_never_far() -> None:
    tables = ("table3", "table2", "table1")
    assert nearest("tabel", tables) == nearest("table9", tables) == "did you mean 'table1'?"
    cells = ("hps/mix_grpo", "base")
    assert nearest("hps/first_step", cells) == "valid: base, hps/mix_grpo"
    assert nearest("a", ()) == "valid: "


@pytest.mark.parametrize(
    ("data", "key", "hint"),
    [
        ({"needed": 1, "leef": {}}, "'leef'", "did you mean 'leaf'?"),
        ({"needed": 1, "leaf": {"widht": 1}}, "'leaf.widht'", "did you mean 'width'?"),
        ({"needed": 1, "maybe": {"widht": 1}}, "'maybe.widht'", "did you mean 'width'?"),
        ({"needed": 1, "many": [{}, {"lable": 1}]}, "'many.1.lable'", "did you mean 'label'?"),
        (
            {"needed": 1, "named": {"a": {"b": {"lable": 1}}}},
            "'named.a.b.lable'",
            "did you mean 'label'?",
        ),
        ({"needed": 1, "either": {"heigth": 1}}, "heigth'", "did you mean 'height'?"),
        ({"needed": 1, "leaf": {"zzz": 1}}, "'leaf.zzz'", "valid: label, width"),
    ],
)
def test_an_unknown_key_names_the_nearest(data: Any, key: str, hint: str) -> None:
    message = problem(Tree, data)
    assert "unknown key" in message
    if "either" not in data:  # a union reports one of its members first
        assert key in message
        assert hint in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"needed": "many"}, ("needed", "integer", "'many'")),
        ({"needed": 1.5}, ("needed", "1.5")),
        ({"needed": 1, "leaf": {"width": None}}, ("leaf.width", "integer (found null)")),
        ({"needed": 1, "width": 2}, ("unknown key 'width'; did you mean ", "'leaf.width'")),
        ({"needed": 1, "until": [1]}, ("until: ", "'profile' or ")),
        ({"needed": 1, "leaf": 3}, ("leaf", "3")),
        ({"needed": 1, "rate": float("nan")}, ("rate", "finite")),
        ({"needed": "two\nlines"}, ("needed",)),
        ({}, ("missing key 'needed'",)),
        ({"neded": 1}, ("unknown key 'neded'", "did you mean 'needed'?")),
        ([], ("dictionary",)),
        ({"needed": "x", "rate": "y"}, ("needed", "1 more")),
        ({"needed": True}, ("needed", "integer", "True")),
        ({"needed": 10.0}, ("needed", "integer", "10.0; write 10")),
        ({"needed": "10"}, ("needed", "integer", "without quotes")),
        ({"needed": 1, "rate": True}, ("rate", "number", "True")),
        ({"needed": 1, "rate": "2e-5"}, ("rate", "number", "without quotes")),
        ({"needed": 1, "flag": 1}, ("flag", "boolean", "1; write true or false")),
        ({"needed": 1, "pair": [1, True]}, ("pair.1", "integer", "True")),
        ({"needed": 1, "leaf": {"label": 12}}, ("leaf.label", "string", "12; put it in quotes")),
        ({"needed": 1, "until": True}, ("until: ", "'profile' or ", "number", "True")),
    ],
)
def test_a_wrong_value_names_the_key(data: Any, words: tuple[str, ...]) -> None:
    message = problem(Tree, data)
    for word in words:
        assert word in message


def test_a_valid_mapping_is_built_and_frozen() -> None:
    tree = validate(Tree, {"needed": 2, "many": [{"width": 5}], "rate": 2, "until": 3}, "here")
    assert tree.many[0].width == 5
    assert (tree.rate, tree.until) == (2.0, 3.0)
    with pytest.raises(ValueError, match="frozen"):
        tree.needed = 3  # type: ignore[misc]


# --- YAML, overrides, merging --------------------------------------------------------------------


def test_load_yaml(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a:\n  b: [1, 2]\nname: σ\n", encoding="utf-8")
    assert load_yaml(file) == {"a": {"b": [1, 2]}, "name": "σ"}
    file.write_text("# nothing\n")
    assert load_yaml(file) == {}


@pytest.mark.parametrize(
    "content",
    [
        "a: [1",
        "a: 1\na: 2",
        "a: {b: 1, b: 1}",
        "? [a]\n: 1\n",
        "a: b: c",
        "\tx",
        "- 1\n- 2",
        "7",
        "a: !!python/object:os.system x",
        "2024-13-45",
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        load_yaml(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_names_its_line_and_a_merge_does_not_count(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("cells:\n  a: {x: 1}\n  b: {x: 2}\n  a: {x: 3}\n")
    with pytest.raises(UserError, match="duplicate key 'a' in line 4"):
        load_yaml(file)
    file.write_text("a: &base {x: 1, y: 2}\nb: {<<: *base, x: 3}\nc: *base\n")
    assert load_yaml(file) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 2}}


def test_an_unreadable_yaml_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path / "latin.yaml")


def test_overrides_are_yaml_values_at_dotted_keys() -> None:
    found = parse_overrides(
        ["a.b=1", "a.c=[1, 2]", "flag=true", "name=x=y", "empty=", "rate=1.0e-5", "a.b=2", "n=null"]
    )
    assert found == {
        "a": {"b": 2, "c": [1, 2]},
        "flag": True,
        "name": "x=y",
        "empty": None,
        "rate": 1e-5,
        "n": None,
    }
    assert parse_overrides([]) == {}


def test_a_number_configures_the_same_run_however_it_is_written() -> None:
    plain = validate(TrainConfig, training("optimization.learning_rate=1.0e-05"), "run")
    for text in ("1e-5", "1E-5", "0.00001", ".00001", "+1.e-5"):
        config = validate(TrainConfig, training(f"optimization.learning_rate={text}"), "run")
        assert content_hash(config.model_dump(mode="json")) == content_hash(
            plain.model_dump(mode="json")
        )


@pytest.mark.parametrize(
    "text", ["novalue", "=1", "a..b=1", ".a=1", "a.=1", "a=[1", "a={b: 1, b: 2}", "a=!!set {b}"]
)
def test_a_bad_override_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="override") as caught:
        parse_overrides([text])
    assert "\n" not in str(caught.value)


def test_merge_lays_mappings_over_one_another() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 3}
    merged = merge(base, {"a": {"y": 5, "z": 6}}, {"b": [9], "c": {"d": 1}}, {"a": {"z": 7}})
    assert merged == {"a": {"x": 1, "y": 5, "z": 7}, "b": [9], "c": {"d": 1}}
    assert base == {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 3}


def test_content_hash_sees_values_and_not_their_order() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    values = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"b": 1}, {"a": [1]}, {"a": None}]
    assert len({content_hash(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="JSON"):
        content_hash({"a": float("inf")})


# --- a training run ------------------------------------------------------------------------------


def training(*overrides: str) -> dict[str, Any]:
    base = {
        "policy": {"source": "policy", "resolution": 32},
        "prompts": {"file": "train.txt"},
        "rewards": {"hps": {"reward": {"model": "hps"}}},
        "method": {"name": "g2rpo"},
    }
    return merge(base, parse_overrides(overrides))


def test_a_plain_training_configuration_is_valid() -> None:
    config = validate(TrainConfig, training(), "run")
    assert config.method.name == "g2rpo"
    assert config.grid.steps == 16
    assert config.notes() == []
    assert validate(TrainConfig, config.model_dump(mode="json"), "stored") == config
    assert config.model_dump()["method"]["granularities"] == (1, 2, 3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.stochastic_steps=[15]"], ("method.stochastic_steps", "15", "0 to 14")),
        (["grid.steps=8", "method.stochastic_steps=[3, 7]"], ("method.stochastic_steps", "0 to 6")),
        (["method.stochastic_steps=[-1]"], ("method.stochastic_steps", "0 to 14")),
        (["method.stochastic_steps=[1, 1]"], ("method.stochastic_steps repeats a step",)),
        (["method.stochastic_steps=[]"], ("method.stochastic_steps is empty",)),
        (["method.granularities=[1, 0]"], ("method.granularities", "0")),
        (["method.granularities=[]"], ("method.granularities", "empty")),
        (["rollout.group_size=1"], ("rollout.group_size", "2")),
        (["rewards.hps.reward.model=hsp"], ("rewards.hps.reward", "'hsp'", "'hps'")),
        (["rewards.hps.reward.modle=hps"], ("rewards.hps.reward", "modle", "'model'")),
        (["rewards.hps.weight=0"], ("rewards.hps.weight", "greater than 0")),
        (
            ["method={name: dance_grpo}", "optimization.update_every=timestep"],
            ("optimization.update_every", "dance_grpo", "iteration"),
        ),
        (
            ["optimization.updates_per_iteration=5"],
            ("optimization.updates_per_iteration", "rollout.group_size"),
        ),
        (
            ["optimization.updates_per_iteration=3", "optimization.update_every=timestep"],
            ("optimization.updates_per_iteration", "optimization.update_every"),
        ),
        (["optimization.optimizer_step=per_step"], ("it was renamed to 'update_every'",)),
        (["advantage.fusion=mean"], ("it was renamed to 'granularity_reduction'",)),
        (["eta=0.5"], ("did you mean 'method.eta'?",)),
        (["pictures={file: a.txt, steps: 3}"], ("unknown key 'pictures.steps'; valid: ",)),
        (["continuations={fp8: true}"], ("it was renamed to 'approximate_rollout'",)),
        (["method.name=g2rp"], ("method.name", "'g2rp'", "'g2rpo'")),
        (["method=g2rpo"], ("method", "mapping with a name", "mix_grpo")),
        (["method.eta=-1"], ("method.eta", "greater than 0")),
        (["method={name: mix_grpo, windowsize: 3}"], ("method.windowsize", "'window_size'")),
        (["method={name: mix_grpo}", "grid.steps=2"], ("grid.steps", "MixGRPO")),
        (["method={name: dance_grpo}", "grid.steps=2"], ("method.trained_fraction=0.6",)),
        (["method={name: dance_grpo, trained_fraction: 0.05}"], ("method.trained_fraction=0.05",)),
        (["grid.steps=1"], ("grid.steps", "2")),
        (["grid.shift=0"], ("grid.shift", "greater than or equal to 0.000001")),
        (["grid.shift=1e7"], ("grid.shift", "less than or equal to 1000000")),
        (
            ["optimization.clip_range=1e21"],
            ("optimization.clip_range", "equal to 100000000000000000000 "),
        ),
        (["method.eta=1e200"], ("method.eta", "equal to 100000000000000000000 ")),
        (
            ["policy.guidance_scale=1e300"],
            ("policy.guidance_scale", "equal to 100000000000000000000 "),
        ),
        (["grid.timestep=exactly"], ("grid.timestep", "'exact'", "'truncated'")),
        (["optimization.betas=[0.9, 1.0]"], ("optimization.betas.1", "less than 1")),
        (["optimization.learning_rate=fast"], ("optimization.learning_rate", "number")),
        (["optimization.iterations=1_000"], ("optimization.iterations", "without", "underscores")),
        (["optimization.iterations=1e3"], ("optimization.iterations", "write 1000")),
        (["advantage.combination=mean"], ("advantage.combination", "'sum'")),
        (["rollouts.group_size=4"], ("rollouts", "'rollout'")),
    ],
)
def test_impossible_training_configurations_name_the_key(
    overrides: list[str], words: tuple[str, ...]
) -> None:
    message = problem(TrainConfig, training(*overrides), "experiment.yaml")
    for word in words:
        assert word in message


def test_a_missing_part_of_a_training_configuration_is_named() -> None:
    for key in ("policy", "prompts", "rewards", "method"):
        data = training()
        del data[key]
        assert f"missing key '{key}'" in problem(TrainConfig, data)


def test_coinciding_granularities_are_told_before_the_run() -> None:
    config = validate(TrainConfig, training("grid.steps=8"), "run")
    (note,) = config.notes()
    assert "step 3" in note
