"""``g2rpo evaluate``: a model against its base, in every form that models come in."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from command_line import g2rpo_here, succeeded, told_here, write_small_profile
from forked import Command
from PIL import Image

from benchmarks.evaluation.protocol import EvaluationConfig
from benchmarks.evaluation.results import Cell, load_cells
from g2rpo.config import load_yaml
from g2rpo.data.prompts import read_prompts
from g2rpo.files import sha256_file
from g2rpo.policy import LoraConfig, PolicyConfig, load_policy
from g2rpo.seeds import gaussian
from reproduce.bundled import bundled_names, named_file
from reproduce.commands.evaluate import Suite, find_model, prompt_file
from reproduce.experiment import load_experiment, load_profile
from reproduce.experiment.profile import with_preset

PROMPTS = ["a red circle", "two green squares", "a blue triangle", "one circle", "a square"]
SUITE = {
    "description": "Mine",
    "prompts": "mine.txt",
    "rewards": {"hps": {}, "clip": {"batch_size": 2}},
    "evaluation": {"images": 2},
}
CHOSEN = ("--suite", "suite.yaml", "--profile", "small.yaml", "--jobs", "1")


@pytest.fixture(scope="module")
def place(smoke_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite, a profile, a LoRA, and a run with its export."""
    place = tmp_path_factory.mktemp("evaluate")
    write_small_profile(place / "small.yaml", smoke_assets)
    shares = {"hardware": {"evaluation_shares": 2}, "name": "shares"}
    (place / "shares.yaml").write_text(yaml.safe_dump({"extends": "small.yaml", **shares}))
    (place / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    (place / "mine.txt").write_text("\n".join(PROMPTS) + "\n")
    config = PolicyConfig(
        source=str(smoke_assets / "policy"), resolution=32, max_sequence_length=24
    )
    policy = load_policy(config, "cpu")
    policy.add_lora(LoraConfig(rank=2, alpha=4), seed=1)
    for name, parameter in policy.transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data += gaussian(parameter.shape, 2, name)
    policy.save_lora(place / "lora")
    arguments = ("table1", "hps/g2rpo", "--profile", "small.yaml", "--results", "trained")
    assert g2rpo_here(place, "train", *arguments) == 0
    (run,) = (place / "trained" / "runs").glob("g2rpo-*")
    run.rename(place / "run")
    assert g2rpo_here(place, "export", "run", "-o", "exported") == 0
    return place


def cells_of(place: Path, out: str) -> tuple[Path, dict[str, Cell]]:
    """The folder of the table that a command printed, and its cells."""
    (written,) = (line for line in out.splitlines() if line.endswith(".json"))
    folder = (place / written.removeprefix("wrote ")).parent
    return folder, {cell.info.row: cell for cell in load_cells(folder / "cells")}


def images_of(place: Path, cell: Cell) -> dict[str, np.ndarray[Any, Any]]:
    run = place / "results" / "runs" / cell.info.runs["train"]
    images = run / "evaluations" / cell.info.runs["evaluation"] / "images"
    return {path.stem: np.array(Image.open(path)) for path in sorted(images.glob("*.png"))}


@pytest.fixture(scope="module")
def lora(place: Path) -> str:
    """What the command prints of the LoRA; the tests after it find the base sampled."""
    code, out, errors = Command(place, "evaluate", "lora", *CHOSEN).wait()
    assert code == 0, errors
    return out


def test_a_lora_is_compared_with_its_base_prompt_by_prompt(place: Path, lora: str) -> None:
    folder, cells = cells_of(place, lora)
    assert cells.keys() == {"base", "model"}
    table = json.loads(next(folder.glob("suite-lora-*.json")).read_text())
    compared = {one["reward"]: one for one in table["comparisons"] if one["question"] == "baseline"}
    assert compared.keys() == {"hps", "clip"}
    for reward, one in compared.items():
        scores = [cells[row].by_reward[reward] for row in ("model", "base")]
        assert one["difference"] == pytest.approx(np.mean(scores[0] - scores[1]), abs=1e-6)
        assert one["low"] <= one["difference"] <= one["high"] and one["count"] == len(PROMPTS)
        assert one["about"] == "checkpoint"
    assert "Model - base, by prompt" in lora
    assert cells["model"].info.provenance.checkpoint == "lora"


def test_the_protocol_is_printed_with_the_table(place: Path, lora: str) -> None:
    prompts = sha256_file(place / "mine.txt")[:12]
    line = (
        "Protocol smoke-ode4: 32×32, 4 steps (shift 3), guidance 3.5, images per prompt: 2, "
        f"seed 1223627, float32, prompts SHA-256 {prompts}."
    )
    assert f"· {line}" in lora
    folder, _ = cells_of(place, lora)
    assert line in next(folder.glob("suite-lora-??????.md")).read_text()


def test_a_prompt_has_the_mean_score_of_its_images(place: Path, lora: str) -> None:
    _, cells = cells_of(place, lora)
    cell = cells["model"]
    images = images_of(place, cell)
    ids = [prompt.id for prompt in read_prompts(place / "mine.txt")]
    assert images.keys() == {*ids[:4], *(f"{one}_1" for one in ids[:4])}  # keep_images: 4
    assert all((images[one] != images[f"{one}_1"]).any() for one in ids[:4])
    run = place / "results" / "runs" / cell.info.runs["train"]
    whole = pd.read_parquet(run / "evaluations" / cell.info.runs["evaluation"] / "scores.parquet")
    assert len(whole) == 2 * 2 * len(PROMPTS)
    for (prompt, reward), part in whole.groupby(["prompt_id", "reward"]):
        scored = cell.scores.set_index(["prompt_id", "reward"])["score"]
        assert scored[prompt, reward] == pytest.approx(
            part["score"].astype("float64").mean(), rel=1e-6
        )


def test_a_run_its_export_and_its_transformer_are_one_model(
    place: Path, lora: str, smoke_assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--base", str(smoke_assets / "policy"))
    found = []
    for arguments in (("run",), ("exported", *base), ("exported/transformer",)):
        out = succeeded(told_here(capsys, place, "evaluate", *arguments, *CHOSEN))
        found.append(cells_of(place, out)[1])
    first, *others = found
    _, before = cells_of(place, lora)
    assert first["base"].info.runs == before["base"].info.runs  # not sampled again
    assert first["model"].info.train_rewards == ("hps",)
    for other in others:
        pd.testing.assert_frame_equal(first["model"].scores, other["model"].scores)
    assert not first["model"].scores.equals(first["base"].scores)


def test_a_whole_pipeline_is_evaluated_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = succeeded(told_here(capsys, place, "evaluate", "exported", *CHOSEN))
    assert "Model - base" not in out
    _, cells = cells_of(place, out)
    assert cells.keys() == {"model"}


def test_killed_and_run_again_in_shares(
    place: Path, lora: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--suite", "suite.yaml", "--profile", "shares.yaml", "--results", "killed")
    command = Command(place, "evaluate", "lora", *chosen, "--jobs", "1")
    runs = place / "killed" / "runs"
    while command.process.is_alive() and not any(runs.glob("checkpoint-*/evaluations/*/images/*")):
        time.sleep(0.05)
    command.kill()
    out = succeeded(told_here(capsys, place, "evaluate", "lora", *chosen))
    _, cells = cells_of(place, out)
    _, whole = cells_of(place, lora)
    for row, cell in cells.items():
        # Batches of other sizes round differently.
        scores = cell.scores.set_index(["prompt_id", "reward"])["score"]
        expected = whole[row].scores.set_index(["prompt_id", "reward"])["score"]
        assert (scores - expected).abs().max() < 0.02


def test_what_cannot_be_evaluated_is_one_line(
    place: Path, smoke_assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "unknown.yaml").write_text(yaml.safe_dump(SUITE | {"rewards": {"hsp": {}}}))
    served = {"http": {"url": "http://127.0.0.1:9", "server": {"api_key_env": "NO_SUCH_KEY"}}}
    (place / "served.yaml").write_text(yaml.safe_dump(SUITE | {"rewards": served}))
    (place / "absent.yaml").write_text(yaml.safe_dump(SUITE | {"prompts": "absent.txt"}))
    (place / "suites").mkdir(exist_ok=True)
    shutil.copy(place / "absent.yaml", place / "suites")
    small, other = CHOSEN[2:], ("--base", str(smoke_assets / "sd3_policy"))
    wrong: list[tuple[tuple[str, ...], str]] = [
        (("nothing", *CHOSEN), "no such folder or file, and not a published model"),
        (("lora", "--suite", "suite.yaml"), "weights without a base; name it with --base"),
        (("lora", "--suite", "papers"), "no suite 'papers'; did you mean 'paper'?"),
        (("nothing", "--suite", "drawbench"), "not a published model"),
        (("lora", "--suite", "drawbench", *small, "--protocol", "x"), "no protocol 'x'"),
        (("lora", "--suite", "drawbench", *small), "run `g2rpo prompts fetch drawbench`"),
        (("lora", "--suite", "absent.yaml", *small), "error: absent.txt: no such prompt file"),
        (
            ("lora", "--suite", "suites/absent.yaml", *small),
            "error: suites/absent.txt or absent.txt: no such prompt file",
        ),
        (("suites", *CHOSEN), "suites: no model: it contains no *.safetensors; give a pipeline"),
        (
            ("lora", "--suite", "unknown.yaml", *small),
            "suite unknown.yaml: rewards.hsp: no reward model 'hsp'; did you mean 'hps'?",
        ),
        (
            ("lora", "--suite", "served.yaml", *small),
            "rewards.http.server.api_key_env: $NO_SUCH_KEY is not set",
        ),
        (
            ("lora", *CHOSEN, "--base", str(smoke_assets / "policy" / "transformer")),
            "transformer: no model_index.json; --base is a pipeline folder",
        ),
        (
            ("lora", *CHOSEN, "--base", "nobody/nothing"),
            "fetch it with `hf download nobody/nothing`",
        ),
        (("lora", *CHOSEN, *other), "use a LoRA for"),
        (("exported", *CHOSEN, *other), "load it over its own base"),
        (("lora", *CHOSEN, "-s", "resolution=33"), "33 is not divisible by 8"),
        (("lora", *CHOSEN, "-s", "imges=2"), "did you mean 'images'?"),
        (("lora", *CHOSEN, "--protocol", "geneval"), "did you mean 'geneval-4'?"),
        (("g2rpo-released", *CHOSEN), "g2rpo weights fetch"),
    ]
    for arguments, message in wrong:
        code, _, err = told_here(capsys, place, "evaluate", *arguments)
        line = err.strip().splitlines()[-1]
        assert code == 2 and line.startswith("error: ") and message in line, (arguments, line)


def test_prompts_are_those_beside_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suite, file = Suite.model_validate(SUITE), Path("suites/suite.yaml")
    Path("mine.txt").write_text("a circle")
    assert prompt_file(suite, file) == "mine.txt"
    file.parent.mkdir()
    file.with_name("mine.txt").write_text("a square")
    assert prompt_file(suite, file) == "suites/mine.txt"


def test_published_models_know_their_base_and_files() -> None:
    released = find_model("yujieouo/G2RPO", None)
    assert released.base == "black-forest-labs/FLUX.1-dev"
    assert released.checkpoint is not None
    assert released.checkpoint.file == "diffusion_pytorch_model.safetensors"
    text = find_model("flow-grpo-text-released", None)
    assert text.base == "stabilityai/stable-diffusion-3.5-medium"
    assert text.checkpoint is not None and text.checkpoint.file == "adapter_model.safetensors"
    nested = find_model("dance-grpo-released", None).checkpoint
    assert nested is not None and nested.subfolder == "checkpoint-300-0"
    experiment = load_experiment("released-sd35")
    for cell in experiment.cells.values():
        if cell.checkpoint is not None:
            assert find_model(cell.checkpoint.source, None).base == experiment.policy


def test_every_bundled_suite_and_protocol_is_valid() -> None:
    for name in bundled_names("protocols"):
        settings = with_preset({"preset": name, "seed": 3})
        assert settings["name"] == name and settings["seed"] == 3
        if "resolution" in settings:  # laid over a profile of wide images
            wide = {"height": 64, "width": 96} | settings
            assert EvaluationConfig(**wide).size == (settings["resolution"],) * 2
    for name in bundled_names("suites"):
        Suite.model_validate(load_yaml(named_file("suites", name)))
    sd35, flux = (load_profile(name).evaluation for name in ("sd35", "flux"))
    assert (sd35.name, sd35.grid.steps, sd35.size) == ("flow_grpo-512-40", 40, (512, 512))
    assert (flux.name, flux.grid.steps, flux.size) == ("g2rpo-1024-50", 50, (1024, 1024))
    assert flux.diversity is not None and flux.diversity == sd35.diversity
