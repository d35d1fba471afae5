"""UnifiedReward on a server: a real one on the loopback, with every way in which one can fail."""

import asyncio
import base64
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_server import SOON, FakeServer, Reply
from PIL import Image
from torch import Tensor

from g2rpo.errors import UserError
from g2rpo.rewards.base import RewardConfig
from g2rpo.rewards.registry import load_reward
from g2rpo.rewards.unified_reward.reward import UnifiedReward

MODEL, KEY = "raters/small", "sk-very-secret"


def says(text: str | None) -> Reply:
    message = {"role": "assistant", "content": text}
    return Reply(body=json.dumps({"choices": [{"index": 0, "message": message}]}))


def good(alignment: float = 4, coherence: float = 3, style: float = 5) -> Reply:
    return says(
        f"Alignment Score (1-5): {alignment:g}\nCoherence Score (1-5): {coherence:g}\n"
        f"Style Score (1-5): {style:g}"
    )


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer("/v1/chat/completions", lambda body, number: good())
    listed = {"data": [{"id": MODEL}, {"id": "raters/large"}]}
    fake.pages["/v1/models"] = Reply(body=json.dumps(listed))
    with fake.running():
        yield fake


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2RPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-another-server")


def load(url: str, cache: bool = True, **server: Any) -> UnifiedReward:
    question = {
        "template": "own",
        "cache": cache,
        "max_answer_tokens": 64,
        "server": {"url": url, "model": MODEL, "retries": 3, **server},
    }
    config = {"model": "unified_reward", "question": question}
    reward = load_reward(RewardConfig.model_validate(config), "cpu")
    assert isinstance(reward, UnifiedReward)
    return reward


def picture(seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (8, 12, 3), generator=draws, dtype=torch.uint8)


def scores(reward: UnifiedReward, number: int = 1) -> Tensor:
    prompts = [f"drawing {i}" for i in range(number)]
    prepared = reward.prepare([picture(i) for i in range(number)], prompts)
    return reward.score_prepared(prepared, prompts)


def number_in(body: dict[str, Any]) -> int:
    """Which picture a request asks about."""
    text = body["messages"][0]["content"][1]["text"]
    return int(text.partition("drawing ")[2].split()[0])


class TestProtocol:
    def test_what_is_sent_and_read(self, server: FakeServer) -> None:
        reward = load(server.url)
        expected = torch.tensor([[4, 4, 3, 5]], dtype=torch.float32)
        assert torch.equal(scores(reward), expected)
        (body,) = server.requests
        assert (body["model"], body["temperature"], body["max_tokens"]) == (MODEL, 0, 64)
        image, text = body["messages"][0]["content"]
        assert text["text"] == reward.template.question("drawing 0")
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.array_equal(pixels, picture(0).numpy())
        assert server.authorizations == [None]
        assert (reward.version, reward.weights_hash) == (f"{MODEL}-mean", f"server:{MODEL}")

    def test_each_answer_belongs_to_its_question(self, server: FakeServer) -> None:
        draws = np.random.default_rng(0).uniform(0, 0.05, 24)

        def answer(body: dict[str, Any], number: int) -> Reply:
            which = number_in(body)
            reply = good(1 + which / 10)
            reply.wait = float(draws[which])
            return reply

        server.answer = answer
        found = scores(load(server.url, concurrency=6), 24)
        torch.testing.assert_close(found[:, 1], 1 + torch.arange(24) / 10)
        assert 1 < server.most <= 6

    def test_a_caller_may_run_an_event_loop(self, server: FakeServer) -> None:
        async def cell_of_a_notebook() -> Tensor:
            return scores(load(server.url))

        assert asyncio.run(cell_of_a_notebook())[0, 0] == 4

    def test_the_key_is_sent(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLM_KEY", KEY)
        scores(load(server.url, api_key_env="VLM_KEY"))
        assert server.authorizations == [f"Bearer {KEY}"]


class TestRetries:
    """Those of failed requests are tested with the reward ``http``, by the same client."""

    @pytest.mark.parametrize("kind", ["application/json", "text/html"])
    def test_a_response_that_is_no_completion(self, server: FakeServer, kind: str) -> None:
        empty, nested = '{"choices": []}', "[" * 100_000
        for body in ("<html>", "{", "[]", "{}", empty, b"\xff\xfe", nested, says(None).body):
            server.requests.clear()
            other = Reply(body=body, headers={"Content-Type": kind})
            server.sequence(other, good())
            assert scores(load(server.url, cache=False))[0, 0] == 4
            server.answer = lambda _, number, reply=other: reply  # type: ignore[misc]
            with pytest.raises(UserError, match=r"not a chat completion with text; .*server\.url"):
                scores(load(server.url, cache=False))
            assert len(server.requests) == 4


class TestAnswersWithoutScores:
    def test_are_asked_for_once_more(self, server: FakeServer) -> None:
        server.sequence(says("I like it."), good())
        assert scores(load(server.url))[0, 0] == 4
        assert len(server.requests) == 2

    def test_are_then_refused_and_not_kept(self, server: FakeServer, tmp_path: Path) -> None:
        long = "I like it.\n" + "very " * 300 + "nice"
        server.answer = lambda body, number: says(long) if number_in(body) == 1 else good()
        with pytest.raises(UserError, match="no score for alignment") as caught:
            scores(load(server.url), 3)
        message = str(caught.value)
        assert "'drawing 1'" in message and "very nice'" in message
        assert "\n" not in message and len(message) < 500
        assert len(server.requests) == 4
        # Those of the two others are: only one is asked for again.
        assert len(list((tmp_path / "cache").rglob("*.json"))) == 2
        server.answer = lambda body, number: good(2)
        assert scores(load(server.url), 3)[:, 1].tolist() == [4, 2, 4]
        assert len(server.requests) == 5


class TestRefusals:
    def test_a_key_that_is_needed(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.answer = lambda body, number: Reply(401, f"bad key {KEY}")
        with pytest.raises(UserError, match=r"HTTP 401, .* name it in api_key_env"):
            scores(load(server.url))
        monkeypatch.setenv("VLM_KEY", KEY)
        with pytest.raises(UserError, match=r"the key in \$VLM_KEY was rejected") as caught:
            scores(load(server.url, api_key_env="VLM_KEY"))
        assert KEY not in str(caught.value)
        assert len(server.requests) == 2

    @pytest.mark.parametrize("value", [None, "", " \n", "a\nb"])
    def test_a_key_that_is_not_there(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch, value: str | None
    ) -> None:
        monkeypatch.delenv("VLM_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("VLM_KEY", value)
        with pytest.raises(UserError, match=r"\$VLM_KEY"):
            load(server.url, api_key_env="VLM_KEY")

    def test_the_key_is_never_shown(
        self,
        server: FakeServer,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level("DEBUG")
        monkeypatch.setenv("VLM_KEY", KEY)
        for status in (400, 503):
            server.answer = lambda body, number, s=status: Reply(s, f"with {KEY}: no", SOON)  # type: ignore[misc]
            with pytest.raises(UserError, match=rf"HTTP {status}: with \*\*\*: no") as caught:
                scores(load(server.url, api_key_env="VLM_KEY", retries=1))
            assert KEY not in repr(caught.value) + repr(caught.value.__context__) + caplog.text

    def test_nor_is_one_in_an_answer(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLM_KEY", KEY)
        server.answer = lambda body, number: says(f"Your key is {KEY}.")
        with pytest.raises(UserError, match=r"Your key is \*\*\*\."):
            scores(load(server.url, api_key_env="VLM_KEY"))
        server.answer = lambda body, number: Reply(404)
        server.pages["/v1/models"] = Reply(body=json.dumps({"data": [{"id": KEY}]}))
        with pytest.raises(UserError, match=r"served models: \*\*\*"):
            scores(load(server.url, api_key_env="VLM_KEY"))

    def test_a_model_that_is_not_served(self, server: FakeServer) -> None:
        server.answer = lambda body, number: Reply(404, json.dumps({"error": "no such model"}))
        with pytest.raises(
            UserError, match="model 'other'; served models: raters/small, raters/large"
        ):
            scores(load(server.url, model="other"))
        assert len(server.requests) == 1

    def test_a_server_of_something_else(self, server: FakeServer) -> None:
        server.pages.clear()
        with pytest.raises(UserError, match=r"not an OpenAI-compatible API; .*server's root"):
            scores(load(f"{server.url}/elsewhere"))

    def test_the_first_failure_ends_all(self, server: FakeServer) -> None:
        later = Reply(503, headers={"Retry-After": "100"})

        def answer(body: dict[str, Any], number: int) -> Reply:
            return later if number_in(body) else Reply(400, "too large", wait=0.2)

        server.answer = answer
        with pytest.raises(UserError, match="HTTP 400: too large"):
            scores(load(server.url, concurrency=4), 12)
        assert len(server.requests) <= 6  # nobody has waited and asked again


class TestVQAScore:
    """The other reward that asks a server, by the log-probabilities of the first token."""

    @staticmethod
    def score(url: str, number: int = 1) -> list[float]:
        question = {"server": {"url": url, "model": MODEL, "retries": 0}}
        reward = load_reward(
            RewardConfig.model_validate({"model": "vqa_score", "question": question}), "cpu"
        )
        assert (reward.version, reward.weights_hash) == (f"{MODEL}-yes", f"server:{MODEL}")
        assert reward.networks() == []
        prompts = [f"drawing {i} x" for i in range(number)]
        return reward.score([picture(i) for i in range(number)], prompts).tolist()

    @staticmethod
    def lists(**logprobs: float) -> Reply:
        top = [
            {"token": token, "logprob": value, "bytes": None} for token, value in logprobs.items()
        ]
        content = {"content": [{**top[0], "top_logprobs": top}]} if top else None
        message = {"role": "assistant", "content": "Yes"}
        choice = {"index": 0, "message": message, "logprobs": content}
        return Reply(body=json.dumps({"choices": [choice]}))

    def test_what_is_asked_and_read(self, server: FakeServer) -> None:
        server.answer = lambda body, number: self.lists(
            No=-1.5, yes=-1.6, Yes=-1.0 - number_in(body)
        )
        found = self.score(server.url, 3)
        assert found == pytest.approx([math.exp(-1 - i) for i in range(3)], rel=1e-6)
        body = server.requests[0]
        assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
        assert body["temperature"] == 1
        which = number_in(body)
        assert body["messages"][0]["content"][1]["text"] == (
            f'Does this figure show "drawing {which} x"? Please answer yes or no.'
        )

    def test_an_answer_that_is_not_listed_is_negligible_or_refused(
        self, server: FakeServer
    ) -> None:
        server.answer = lambda body, number: self.lists(No=-0.01, no=-11.0)
        assert self.score(server.url) == [0.0]
        server.answer = lambda body, number: self.lists(No=-0.01, no=-5.0)
        with pytest.raises(UserError, match=r"'Yes' is not among the 2 .*'drawing 0 x'.* 0\.0067"):
            self.score(server.url)

    def test_probabilities_above_1_are_refused(self, server: FakeServer) -> None:
        for wrong in ({"Yes": 5.0}, {"No": 1e5, "Yes": -1.0}, {"Yes": -0.1, "No": -0.2}):
            server.answer = lambda body, number, w=wrong: self.lists(**w)  # type: ignore[misc]
            with pytest.raises(UserError, match=r"'drawing 0 x', .* add up to more than 1; "):
                self.score(server.url)
        server.answer = lambda body, number: self.lists(Yes=0.001, No=-8.0)  # rounded
        assert self.score(server.url) == [1.0]

    def test_a_server_without_log_probabilities(self, server: FakeServer) -> None:
        for reply in (self.lists(), says("Yes"), Reply(body="[]"), self.lists(Yes=10**400)):
            server.answer = lambda body, number, r=reply: r  # type: ignore[misc]
            with pytest.raises(UserError, match="not a chat completion with log-probabilities; "):
                self.score(server.url)

    def test_soft_tifa_adds_the_spellings_that_are_listed(
        self, server: FakeServer, tmp_path: Path
    ) -> None:
        path = tmp_path / "set.jsonl"
        pairs = [["How many cows?", "two"], ["Are the cows red?", "Yes"]]
        path.write_text(json.dumps({"prompt": "two red cows", "vqa_list": pairs}))
        question = {"server": {"url": server.url, "model": MODEL, "retries": 0}}
        settings = {"model": "soft_tifa", "question": question, "questions": str(path)}
        reward = load_reward(RewardConfig.model_validate(settings), "cpu")
        server.answer = lambda body, number: self.lists(
            **{"No": -2.5, "yes": -2.0, " Yes": -3.0, "2": -1.0, " two": -4.0, "three": -2.5}
        )
        atoms = [math.exp(-1) + math.exp(-4), math.exp(-2) + math.exp(-3)]
        prepared = reward.prepare([picture(0)], ["two red cows"])
        assert reward.score_prepared(prepared, ["two red cows"])[0].tolist() == pytest.approx(
            [sum(atoms) / 2, math.sqrt(math.prod(atoms))], rel=1e-6
        )
        texts = [body["messages"][0]["content"][1]["text"] for body in server.requests]
        assert set(texts) == {f"{asked} Answer in one word." for asked, _ in pairs}
