"""A text encoder that costs nothing, and a process that fills a cache with it.

``python -m fake_encoder FOLDER COUNT SECONDS`` encodes the prompts 0 to COUNT - 1 into
FOLDER, in shards of 4, and waits SECONDS at each.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from g2rpo.data.embeddings import EmbeddingCache, FillSettings, Rows, fill
from g2rpo.seeds import gaussian

LENGTH, WIDTH, POOLED = 5, 8, 6
PROMPT_BYTES = (LENGTH * WIDTH + POOLED) * 2


def prompts_of(count: int) -> list[str]:
    return [f"prompt number {index}" for index in range(count)]


def encode(prompt: str) -> Rows:
    return {
        "prompt_embeds": gaussian((LENGTH, WIDTH), 1, "sequence", prompt).bfloat16(),
        "pooled_prompt_embeds": gaussian((POOLED,), 1, "pooled", prompt).bfloat16(),
    }


class Recorder:
    """Gives the encoder and remembers what it was asked to encode."""

    def __init__(self, seconds: float = 0.0, after: Callable[[int], None] | None = None) -> None:
        self.encoded: list[str] = []
        self.loads = 0
        self.seconds, self.after = seconds, after

    def __call__(self, prompts: Sequence[str]) -> Callable[[str], Rows]:
        self.loads += 1
        return self._encode

    def _encode(self, prompt: str) -> Rows:
        time.sleep(self.seconds)
        self.encoded.append(prompt)
        if self.after is not None:
            self.after(len(self.encoded))
        return encode(prompt)


def settings() -> FillSettings:
    return FillSettings(PROMPT_BYTES, 4, {"device": "none"})


def main() -> None:
    folder, count, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    recorder = Recorder(float(seconds))
    fill(EmbeddingCache(Path(folder)), prompts_of(int(count)), recorder, settings())
    print(len(recorder.encoded))


if __name__ == "__main__":
    main()
