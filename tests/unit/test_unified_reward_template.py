"""Questions and their configuration: which template is used, and what a mistake says."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.hub.cache import repository_folder
from g2rpo.hub.catalogue import catalogue
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.question import ASPECTS, QuestionConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.rewards.server import ServerConfig
from g2rpo.rewards.unified_reward.template import (
    OWN_FILE,
    Template,
    choose_template,
    published_question,
    question_inputs,
)

SERVER = {"url": "http://127.0.0.1:9", "model": "some/model"}


def write(folder: Path, text: str) -> Path:
    path = folder / "template.txt"
    path.write_bytes(text.encode())
    return path


class TestTemplate:
    def test_the_projects_own(self) -> None:
        own = Template.read(OWN_FILE)
        assert (own.low, own.high) == (1.0, 5.0)
        assert own.sha256 == hashlib.sha256(OWN_FILE.read_bytes()).hexdigest()
        assert "---" not in own.text
        assert "caption: two cats\n" in own.question("two cats")

    def test_braces_are_ordinary_characters(self, tmp_path: Path) -> None:
        template = Template.read(write(tmp_path, 'Say {"a": 1} {{x}} of [{prompt}], {prompt}!'))
        question = template.question("{0} {prompt} {x}")
        assert question == 'Say {"a": 1} {{x}} of [{0} {prompt} {x}], {0} {prompt} {x}!'

    def test_the_scale_is_declared_or_1_to_5(self, tmp_path: Path) -> None:
        declared = Template.read(write(tmp_path, "scale: 0 to 10\n---\nRate {prompt}"))
        assert (declared.low, declared.high, declared.text) == (0.0, 10.0, "Rate {prompt}")
        plain = Template.read(write(tmp_path, "Rate {prompt}"))
        assert (plain.low, plain.high) == (1.0, 5.0)
        assert plain.sha256 != declared.sha256

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("Rate the image", r"no \{prompt\}"),
            ("scale: 5 to 1\n---\n{prompt}", "scale 5 to 1 is empty"),
            ("scale: 1.2.3 to 5\n---\n{prompt}", "not a valid scale"),
        ],
    )
    def test_impossible_templates(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            Template.read(write(tmp_path, text))

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nowhere\.txt: cannot read .*No such file"):
            Template.read(tmp_path / "nowhere.txt")
        (tmp_path / "latin.txt").write_bytes(b"\xe9 {prompt}")
        with pytest.raises(UserError, match="not UTF-8"):
            Template.read(tmp_path / "latin.txt")


class TestChoice:
    def test_a_path_and_its_hash(self, tmp_path: Path) -> None:
        path = write(tmp_path, "Rate {prompt}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        good = QuestionConfig(template=str(path), template_sha256=digest)
        assert choose_template(good, "CodeGoat24/UnifiedReward-qwen-7b").sha256 == digest
        bad = QuestionConfig(template=str(path), template_sha256="0" * 64)
        with pytest.raises(UserError, match=f"SHA-256 is {digest}, but .* is 0000"):
            choose_template(bad, "any")

    def test_the_model_may_bring_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "question_template.txt").write_text("Is this {prompt}?")
        found = choose_template(QuestionConfig(), "any", tmp_path)
        assert found.question("it") == "Is this it?"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, r"UnifiedReward-qwen-7b was trained .* set question\.template to 'published'"),
            ({"server": SERVER | {"model": "CodeGoat24/UnifiedReward-7b"}}, "its authors' quest"),
            ({"server": SERVER}, "no default question for some/model; set question.template"),
        ],
    )
    def test_a_model_without_a_question_says_what_to_do(
        self, changes: dict[str, Any], message: str
    ) -> None:
        config = RewardConfig.model_validate({"model": "unified_reward", "question": changes})
        with pytest.raises(UserError, match=message):
            load_reward(config, "cpu")


class TestConfig:
    @pytest.mark.parametrize(
        ("question", "message"),
        [
            ({"templat": "own"}, "unknown key 'question.templat'; did you mean 'template'"),
            ({"aggregate": "median"}, r"should be 'mean', .* 'style' \(found 'median'\)$"),
            ({"aggregate": {"stile": 1}}, "unknown key .*stile'; did you mean 'style'"),
            ({"aggregate": {"alignment": 0}}, "at least one aspect"),
            ({"aggregate": {"style": -1}}, "greater than or equal to 0"),
            ({"template_sha256": "abc"}, "template_sha256"),
            ({"dtype": "float16"}, "dtype"),
            ({"dtype": "float32", "server": SERVER}, "no effect with a server"),
            ({"server": SERVER | {"url": "host:8000"}}, "url must be like http"),
            ({"server": SERVER | {"concurrency": 0}}, "concurrency"),
            ({"server": SERVER | {"timeout_seconds": 0}}, "timeout_seconds"),
        ],
    )
    def test_mistakes_are_reported(self, question: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            validate(RewardConfig, {"model": "unified_reward", "question": question}, "x.yaml")

    def test_a_password_in_the_url_is_refused_and_not_shown(self) -> None:
        server = SERVER | {"url": "http://me:hunter2@host:8000"}
        with pytest.raises(UserError, match="must not contain a password") as caught:
            validate(RewardConfig, {"model": "x", "question": {"server": server}}, "x.yaml")
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        "url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"]
    )
    def test_the_root_and_v1_are_the_same(self, url: str) -> None:
        assert ServerConfig(url=url).api() == "http://h:1/v1"

    def test_weights(self) -> None:
        assert QuestionConfig().weights() == pytest.approx(dict.fromkeys(ASPECTS, 1 / 3))
        only = QuestionConfig(aggregate="style")
        assert only.weights() == {"alignment": 0, "coherence": 0, "style": 1}
        mixed = QuestionConfig.model_validate({"aggregate": {"alignment": 3, "style": 1}})
        assert mixed.weights() == {"alignment": 0.75, "coherence": 0, "style": 0.25}
        assert mixed.aggregate_name() == "alignment=0.75,coherence=0,style=0.25"
        assert (only.aggregate_name(), QuestionConfig().aggregate_name()) == ("style", "mean")

    def test_other_rewards_have_no_question(self) -> None:
        config = RewardConfig(model="hps", question=QuestionConfig())
        with pytest.raises(UserError, match="hps: asks no question"):
            load_reward(config, "cpu")

    def test_the_dump_of_other_rewards_is_what_it_was(self) -> None:
        keys = {"model", "source", "revision", "variant", "batch_size"}
        assert set(RewardConfig(model="hps").model_dump(mode="json")) == keys
        asked = RewardConfig(model="unified_reward", question=QuestionConfig(aggregate="style"))
        assert RewardConfig.model_validate_json(asked.model_dump_json()) == asked

    def test_what_determines_scores(self, tmp_path: Path) -> None:
        path = write(tmp_path, "Rate {prompt}")
        config = QuestionConfig.model_validate({"template": str(path), "server": SERVER})
        inputs = question_inputs(config)
        assert inputs["template"] == hashlib.sha256(path.read_bytes()).hexdigest()
        other = config.model_copy(update={"aggregate": "style"})
        assert question_inputs(other) != inputs
        moved = tmp_path / "moved.txt"
        path.rename(moved)
        elsewhere = SERVER | {"url": "http://other:1", "retries": 9, "api_key_env": "KEY"}
        same = {"template": str(moved), "server": elsewhere, "cache": False}
        assert question_inputs(QuestionConfig.model_validate(same)) == inputs
        assert question_inputs(QuestionConfig())["template"] is None


def test_a_variant_or_a_source_beside_a_server_is_refused() -> None:
    with pytest.raises(UserError, match="no variants"):
        load_reward(RewardConfig(model="unified_reward", variant="7b"), "cpu")
    question = QuestionConfig.model_validate({"server": SERVER, "template": "own"})
    with pytest.raises(UserError, match="remove `source`"):
        load_reward(RewardConfig(model="unified_reward", source="a/b", question=question), "cpu")


class TestPublishedQuestion:
    """The text in an example script; this one is ours, built like the authors'."""

    SCRIPT = """
import sys
sys.exit("this script is never run")
name = "x"
prompt = ""
path = f"/images/{name}"
message = {"text": ("Look at the picture.\\n\\n" "- One (1 to 5): \\"A\\"\\n" f"Now: {1}")}
message = {"text": ("Look at the picture.\\n\\n" "- One: \\"A\\" {{x}}\\n" f"Now: [{prompt}]")}
"""

    def script(self, folder: Path, text: str) -> Path:
        path = folder / "example.py"
        path.write_text(text)
        return path

    def test_is_read_and_not_run(self, tmp_path: Path) -> None:
        template = published_question(self.script(tmp_path, self.SCRIPT))
        text = 'Look at the picture.\n\n- One: "A" {{x}}\nNow: [{prompt}]'
        assert template.text == text
        assert template.sha256 == hashlib.sha256(text.encode()).hexdigest()
        assert template.question("a cat").endswith("Now: [a cat]")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x = 'no caption'", "found 0 questions"),
            ("a = f'{prompt} one'\nb = f'{prompt} two'", "found 2 questions"),
            ("a = (", "cannot be parsed"),
        ],
    )
    def test_what_is_no_question_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            published_question(self.script(tmp_path, text))

    def test_it_must_be_fetched_first_and_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("G2RPO_CACHE", str(tmp_path))
        config = QuestionConfig(template="published")
        with pytest.raises(UserError, match="weights fetch unified-reward-question"):
            choose_template(config, "CodeGoat24/UnifiedReward-qwen-7b")
        (artifact,) = catalogue().select(["unified-reward-question"], ("reward",))
        (file,) = artifact.files
        assert artifact.revision is not None
        path = repository_folder(artifact) / artifact.revision / file.path
        path.parent.mkdir(parents=True)
        path.write_text(self.SCRIPT)
        found = choose_template(config, "CodeGoat24/UnifiedReward-qwen-7b")
        assert found == published_question(path)
        wrong = QuestionConfig(template="published", template_sha256="0" * 64)
        with pytest.raises(UserError, match="published: the template's SHA-256"):
            choose_template(wrong, "CodeGoat24/UnifiedReward-qwen-7b")
