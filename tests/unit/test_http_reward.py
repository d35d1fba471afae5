"""Rewards over HTTP: the reference server on the loopback, and others that fail."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import uvicorn
from fake_server import SOON, FakeServer, Reply, unused_url
from PIL import Image
from torch import Tensor

from benchmarks.mini_world import world
from g2rpo.config import validate
from g2rpo.errors import UserError
from g2rpo.rewards import http
from g2rpo.rewards.base import BatchedReward, RewardConfig
from g2rpo.rewards.client import png_base64
from g2rpo.rewards.registry import load_reward
from g2rpo.rewards.server import ServerConfig
from reproduce.experiment import ROOT, fingerprint
from reproduce.serving import reward_app

KEY = "sk-very-secret"
NESTED, LONE_SURROGATE = "[" * 100_000, '{"version": "\\ud800"}'
PROMPTS = world.make_captions(7, "train", 11)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    http._asked.cache_clear()


@pytest.fixture(scope="module")
def hps(smoke_assets: Path) -> BatchedReward:
    return load_reward(config_of(smoke_assets), "cpu")


def config_of(assets: Path, batch_size: int = 4) -> RewardConfig:
    source = str(assets / "rewards" / "hps")
    return RewardConfig(model="hps", source=source, batch_size=batch_size)


def client(url: str, batch_size: int = 32, **server: Any) -> http.HTTPReward:
    config = {"model": "http", "batch_size": batch_size, "server": {"url": url, **server}}
    reward = load_reward(RewardConfig.model_validate(config), "cpu")
    assert isinstance(reward, http.HTTPReward)
    return reward


def pictures(number: int) -> Tensor:
    draws = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (number, 24, 32, 3), generator=draws, dtype=torch.uint8)


@contextmanager
def served(model: BatchedReward, **settings: Any) -> Iterator[str]:
    """The address of the reference server."""
    config = uvicorn.Config(reward_app(model, **settings), port=0, log_level="warning")
    listening = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


class Offset(BatchedReward):
    """A score with two parts, which names the image and its prompt."""

    name = "offset"
    part_names = ("first", "length")
    template_hash = "f" * 64

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> "Offset":
        return cls(device, config.batch_size, "1", "none")

    def evaluate(self, prepared: Any) -> Tensor:
        pairs = [
            (float(image[0, 0, 0]), len(prompt)) for image, prompt in zip(*prepared, strict=True)
        ]
        return torch.tensor([[first / 3, first, length] for first, length in pairs])


class TestReferenceServer:
    def test_scores_are_those_of_this_process(self, hps: BatchedReward) -> None:
        with served(hps) as url:
            reward = client(url)
            found = reward.score(pictures(11), PROMPTS)
        assert torch.equal(found, hps.score(pictures(11), PROMPTS))
        assert found.std() > 1e-3
        assert (reward.version, reward.weights_hash) == (f"hps-{hps.version}", hps.weights_hash)
        assert reward.columns == ("http",) and reward.template_hash is None

    def test_parts_and_order(self) -> None:
        model = Offset("cpu", 2, "1", "none")
        images = pictures(11)
        with served(model) as url:
            reward = client(url, concurrency=5)
            found = reward.score_prepared(reward.prepare(list(images), PROMPTS), PROMPTS)
        assert reward.columns == ("http", "http.first", "http.length")
        assert reward.template_hash == model.template_hash
        first = images[:, 0, 0, 0].float()
        lengths = torch.tensor([float(len(prompt)) for prompt in PROMPTS])
        assert torch.equal(found, torch.stack([first / 3, first, lengths], dim=1))

    def test_a_key(self, hps: BatchedReward, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REWARD_KEY", KEY)
        with served(hps, key=KEY) as url:
            assert len(client(url, api_key_env="REWARD_KEY").score(pictures(2), PROMPTS[:2])) == 2
            with pytest.raises(UserError, match=r"HTTP 401, .* name it in api_key_env"):
                client(url)
            monkeypatch.setenv("OTHER_KEY", "sk-other")
            with pytest.raises(UserError, match=r"the key in \$OTHER_KEY was rejected") as caught:
                client(url, api_key_env="OTHER_KEY")
        assert "sk-other" not in repr(caught.value) + repr(caught.value.__context__)
        with pytest.raises(UserError, match=r"^server.api_key_env: \$NO_KEY is not set"):
            client(url, api_key_env="NO_KEY")

    def test_bad_requests_are_refused(self, hps: BatchedReward) -> None:
        good = png_base64(pictures(1)[0])
        gray = io.BytesIO()
        Image.new("F", (4, 4)).save(gray, format="TIFF")
        cases: list[tuple[Any, str]] = [
            ({}, "prompts: Field required"),
            ({"prompts": [], "images": []}, "prompts: List should have at least 1 item"),
            ({"prompts": ["a"], "images": [3]}, "images.0: Input should be a valid string"),
            ({"prompts": ["a", "b"], "images": [good]}, "1 images but 2 prompts"),
            ({"prompts": [" "], "images": [good]}, "prompt 0 is empty"),
            ({"prompts": ["a"], "images": ["?"]}, "image 0: not base64"),
            ({"prompts": ["a"], "images": [good[:40]]}, "image 0: not a readable image"),
            ({"prompts": ["a"], "images": [base64.b64encode(gray.getvalue()).decode()]}, "white"),
            ({"prompts": ["a"] * 5, "images": [good] * 5}, "send at most 4"),
        ]  # fmt: skip
        with served(hps, max_bytes=20_000) as url, httpx2.Client(base_url=url) as web:
            for body, message in cases:
                answer = web.post("/v1/score", json=body)
                assert answer.status_code == 422
                assert message in answer.json()["detail"]
            broken = web.post(
                "/v1/score", content="{", headers={"Content-Type": "application/json"}
            )
            assert broken.status_code == 422 and "JSON" in broken.json()["detail"]
            for body, message in (
                ({"prompts": ["a \ud800"], "images": [good]}, "prompt 0 is not valid Unicode"),
                ({"prompts": ["a"], "images": ["\ud800"]}, "image 0: not base64"),
            ):
                kind = {"Content-Type": "application/json"}
                answer = web.post("/v1/score", content=json.dumps(body), headers=kind)
                assert answer.status_code == 422 and message in answer.json()["detail"]
            large = {"prompts": ["a" * 20_000], "images": [good]}
            assert web.post("/v1/score", json=large).status_code == 413
            endless = web.post("/v1/score", content=iter([b"{}"]))
            assert endless.status_code == 411
            assert web.get("/v1/score").status_code == 405

    def test_the_committed_description_is_its_own(self, hps: BatchedReward) -> None:
        path = ROOT / "docs" / "reward_server.json"
        found = reward_app(hps).openapi()
        assert json.loads(path.read_text()) == found, (
            f"the API has changed: write {json.dumps(found)} to {path.name}"
        )


INFO = {"name": "mine", "version": "3", "weights_hash": "a" * 64, "batch_size": 2}


def info(**changes: Any) -> Reply:
    return Reply(body=json.dumps(INFO | changes))


def scores_of(body: dict[str, Any], **changes: Any) -> Reply:
    reply = {"scores": [float(len(prompt)) for prompt in body["prompts"]], **INFO, **changes}
    return Reply(body=json.dumps(reply))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer("/v1/score", lambda body, number: scores_of(body))
    fake.pages["/v1/info"] = info()
    with fake.running():
        yield fake


def score(server: FakeServer, **settings: Any) -> Tensor:
    return client(server.url, **settings).score(pictures(5), PROMPTS[:5])


EXPECTED = torch.tensor([float(len(prompt)) for prompt in PROMPTS[:5]])


class TestMisbehavingServers:
    def test_transient_failures_are_retried(self, server: FakeServer) -> None:
        failures = [Reply(status, "busy", SOON) for status in (408, 409, 429, 500, 502, 503)]
        bad = [Reply(hang_up=True), *failures, Reply(wait=0.5)]
        server.answer = lambda body, number: bad[number - 1] if number <= 8 else scores_of(body)
        found = score(server, timeout_seconds=0.2, retries=8, concurrency=1)
        assert torch.equal(found, EXPECTED)
        assert len(server.requests) == 8 + 3

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            (Reply(500, "out of memory", SOON), "after 2 attempts: HTTP 500: out of memory"),
            (Reply(wait=0.5), r"after 2 attempts: timed out after 0\.2 s; .*server\.retries"),
            (Reply(hang_up=True), "after 2 attempts: connection failed"),
            (Reply(400, "too large"), "HTTP 400: too large$"),
            (Reply(404, "no such page"), "HTTP 404, not a server of rewards"),
            (Reply(413, "11 MB"), "HTTP 413: 11 MB; lower the reward's batch_size"),
            (
                Reply(302, "", {"Location": "http://127.0.0.1:9/v1/a?key=secret"}),
                r"HTTP 302, the server redirects to 127\.0\.0\.1:9/v1/a; set server\.url to",
            ),
            (Reply(301, "", {"Location": "/b"}), r"redirects to 127\.0\.0\.1:\d+/b; set"),
            (Reply(300), "HTTP 300, the server redirects; set"),
            (Reply(body=" " * 20, drip=0.05), r"after 2 attempts: timed out after 0\.2 s"),
            (Reply(400, " " * 20, drip=0.05), r"after 2 attempts: timed out after 0\.2 s"),
        ],
    )
    def test_what_does_not_pass_stops(self, server: FakeServer, reply: Reply, message: str) -> None:
        server.answer = lambda body, number: reply
        with pytest.raises(UserError, match=f"^{server.url}: .*{message}"):
            score(server, timeout_seconds=0.2, retries=1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"scores": [1.0]}, "1 scores for 2 images"),
            ({"scores": [1.0] * 3}, "3 scores for 2 images"),
            ({"scores": [1.0, float("nan")]}, rf"not finite for prompt '{PROMPTS[1]}'"),
            ({"scores": [1.0, float("-inf")]}, r"score \[-inf\] is not finite"),
            ({"scores": [1.0, 1e300]}, r"score \[inf\] is not finite"),
            ({"scores": [1.0, None]}, r"/v1/score is not as in .*json: scores\.1"),
            ({"scores": "12"}, r"/v1/score is not as in .*json: scores"),
            ({"version": "4"}, "changed from version '3'.* to version '4'.*start again"),
            ({"weights_hash": "b" * 64}, f"weights '{'a' * 64}' to .*'{'b' * 64}'"),
        ],
    )
    def test_wrong_answers_stop_at_once(
        self, server: FakeServer, changes: dict[str, Any], message: str
    ) -> None:
        server.answer = lambda body, number: scores_of(body, **changes)
        with pytest.raises(UserError, match=f"^{server.url}: .*{message}") as caught:
            score(server, concurrency=1)
        assert len(server.requests) == 1
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["application/json", "text/html"])
    @pytest.mark.parametrize(
        "body", ["", "<html>", "{", "[]", "{}", b"\xff\xfe", "3", "null", NESTED, LONE_SURROGATE]
    )
    def test_garbage_stops_at_once(self, server: FakeServer, body: str | bytes, kind: str) -> None:
        garbage = Reply(body=body, headers={"Content-Type": kind})
        server.answer = lambda body, number: garbage
        with pytest.raises(UserError, match=f"^{server.url}: .*/v1/score is not as in docs"):
            score(server)
        server.pages["/v1/info"] = garbage
        http._asked.cache_clear()
        with pytest.raises(UserError, match=f"^{server.url}: .*/v1/info is not as in docs"):
            score(server)

    def test_a_reply_is_an_object_of_different_keys(self, server: FakeServer) -> None:
        server.answer = lambda body, number: Reply(body='{"parts": {"a": [], "a": []}}')
        with pytest.raises(UserError, match=r"/v1/score is .*json: not .*duplicate key 'a'"):
            score(server)
        server.pages["/v1/info"] = Reply(body="[]")
        http._asked.cache_clear()
        with pytest.raises(UserError, match=r"/v1/info is not as in .*json: not a JSON object$"):
            score(server)

    @pytest.mark.parametrize("parts", [["a", "b", "a"], ["a", ""], [" "]])
    def test_parts_have_different_names(self, server: FakeServer, parts: list[str]) -> None:
        server.pages["/v1/info"] = info(parts=parts)
        with pytest.raises(UserError, match=r"json: parts: a name is empty or given twice in \["):
            score(server)

    @pytest.mark.parametrize(
        "changes", [{"version": f"3 {KEY}"}, {"scores": [f"of {KEY}"] * 2}, {"weights_hash": KEY}]
    )
    def test_a_key_in_an_answer_is_not_shown(
        self, server: FakeServer, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REWARD_KEY", KEY)
        server.answer = lambda body, number: scores_of(body, **changes)
        with pytest.raises(UserError, match=r"\*\*\*") as caught:
            score(server, api_key_env="REWARD_KEY")
        assert KEY not in repr(caught.value) + repr(caught.value.__context__)

    @pytest.mark.parametrize("changes", [{"version": f"3 {KEY}"}, {"name": KEY}, {"parts": [KEY]}])
    def test_a_key_in_what_results_would_name_is_refused(
        self, server: FakeServer, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REWARD_KEY", KEY)
        server.pages["/v1/info"] = info(**changes)
        with pytest.raises(UserError, match=r"shows the key in \$REWARD_KEY") as caught:
            score(server, api_key_env="REWARD_KEY")
        assert KEY not in repr(caught.value) + repr(caught.value.__context__)
        assert not server.requests

    def test_an_empty_version_stops(self, server: FakeServer) -> None:
        server.pages["/v1/info"] = info(version="")
        with pytest.raises(UserError, match="the answer to /v1/info is not as in docs/reward_s"):
            score(server)

    def test_a_part_may_be_called_scores(self, server: FakeServer) -> None:
        server.pages["/v1/info"] = info(parts=["scores", "style"])
        server.answer = lambda body, number: scores_of(
            body, parts={"style": [5.0, 6.0], "scores": [3.0, 4.0]}
        )
        reward = client(server.url)
        prepared = reward.prepare(list(pictures(2)), PROMPTS[:2])
        found = reward.score_prepared(prepared, PROMPTS[:2])
        assert reward.columns == ("http", "http.scores", "http.style")
        assert found[:, 1:].tolist() == [[3.0, 5.0], [4.0, 6.0]]

    def test_a_missing_part_stops(self, server: FakeServer) -> None:
        server.pages["/v1/info"] = info(parts=["style"])
        with pytest.raises(UserError, match="0 style for 2 images"):
            score(server, concurrency=1)

    def test_nothing_listens(self) -> None:
        url = unused_url()
        with pytest.raises(UserError, match=f"^{url}: no answer after 1 attempts: connection fail"):
            client(url, retries=0)

    def test_requests_are_as_large_as_the_server_takes(self, server: FakeServer) -> None:
        assert torch.equal(score(server, concurrency=3), EXPECTED)
        assert sorted(len(body["images"]) for body in server.requests) == [1, 2, 2]
        assert torch.equal(score(server, batch_size=1), EXPECTED)
        assert {len(body["images"]) for body in server.requests[3:]} == {1}


class TestNamesOfRuns:
    def test_the_model_counts_and_the_address_does_not(self, server: FakeServer) -> None:
        def inputs(url: str, **changes: Any) -> dict[str, Any]:
            config = {"model": "http", "server": {"url": url, **changes}}
            return fingerprint.reward_inputs(RewardConfig.model_validate(config))

        one = inputs(server.url)
        assert one["server"] == {
            "name": "mine", "version": "3", "weights_hash": "a" * 64, "template_hash": None
        }  # fmt: skip
        other = FakeServer("/v1/score", lambda body, number: scores_of(body))
        other.pages["/v1/info"] = info(batch_size=8)
        with other.running():
            assert inputs(other.url, retries=1) == one
        server.pages["/v1/info"] = info(version="4")
        assert inputs(server.url) == one  # asked once
        http._asked.cache_clear()
        assert inputs(server.url) != one

    def test_a_url_is_short_for_a_server(self) -> None:
        settings = {"model": "http", "url": "http://h:1"}
        server = ServerConfig(url="http://h:1")
        assert RewardConfig.model_validate(settings) == RewardConfig(model="http", server=server)
        assert settings == {"model": "http", "url": "http://h:1"}
        settings["server"] = {"retries": 1}
        combined = ServerConfig(url="http://h:1", retries=1)
        assert RewardConfig.model_validate(settings).server == combined
        settings["server"] = {"retries": 1, "url": "http://h:1"}
        assert RewardConfig.model_validate(settings).server == combined

    def test_a_plan_needs_no_server(self) -> None:
        config = RewardConfig(model="http", server=ServerConfig(url=unused_url(), retries=0))
        with pytest.raises(UserError, match="connection failed"):
            fingerprint.reward_inputs(config)
        with fingerprint.absent_inputs_named():
            assert "absent" in fingerprint.reward_inputs(config)["server"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"model": "http"}, "needs url: http://host:8000"),
            ({"model": "hps", "url": "http://h:1"}, "only that, needs url"),
            ({"model": "http", "url": "h:1"}, "url must be like http://host:8000"),
            (
                {"model": "http", "url": "http://h:1", "server": {"url": "http://h:2"}},
                "url and server.url are different; set one of them",
            ),
            ({"model": "hps", "server": {"url": "http://h:1"}}, "only that, needs url"),
            ({"model": "http", "server": {"url": "h:1"}}, "url must be like http://host:8000"),
            ({"model": "http", "source": "x", "server": {"url": "http://h:1"}}, "remove source"),
            ({"model": "http", "server": {"uri": "http://h:1"}}, "did you mean 'url'"),
        ],
    )
    def test_mistakes_are_reported(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            validate(RewardConfig, settings, "x.yaml")
