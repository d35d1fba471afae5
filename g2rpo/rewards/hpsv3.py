"""HPSv3: Qwen2-VL-7B with a reward head, trained on human preferences (arXiv 2508.03789).

The score is mu, the first of the head's two outputs (mu, log sigma), at the token ``<|Reward|>`` of
the authors' question. As in the package hpsv3 1.0.0, with which the model was trained:

- an image is scaled to about 256 * 28 * 28 pixels, sides multiples of 28 (8-bit, Pillow, bicubic);
- tokens have the positions 0, 1, 2, ..., those of the image too, where Qwen2-VL has positions in
  time, height and width;
- the frequencies of the rotary embeddings, and the angles of patches, are rounded to bfloat16;
- the network is in bfloat16 and its head in float32.

The question is not part of this project. It is in a file of the authors' code, which is fetched
like weights and parsed; the code is never run.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import accelerate
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from g2rpo.errors import UserError
from g2rpo.files import read_json, sha256_file
from g2rpo.hub.fetch import fetch_snapshot, fetched_file
from g2rpo.rewards.base import BatchedReward, RewardConfig, choose_variant
from g2rpo.rewards.question import QWEN_ASPECT
from g2rpo.rewards.unified_reward.local import ChatInputs, cannot_score
from g2rpo.rewards.unified_reward.template import BESIDE_THE_MODEL, PLACEHOLDER, Template, parsed
from g2rpo.rewards.weights import load_state, locate, read_weights

PUBLISHED, PUBLISHED_BASE = "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"
WEIGHTS = "HPSv3.safetensors"
QUESTION_ARTIFACT = "hpsv3-question"
REWARD_TOKEN = "<|Reward|>"  # noqa: S105
PIXELS = 256 * 28 * 28
DTYPES = ("bfloat16", "float32")
_BASE_FILES = ("*.json", "*.txt")


class _RoundedAngles(nn.Module):
    """The patches' rotary embedding, with angles rounded as in the package."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary: Any = rotary

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[N, width of a head]`` of rows and columns ``[2, N]``."""
        angles = position_ids[..., None].bfloat16() * self.rotary.inv_freq.bfloat16()
        cos, sin = (
            self.rotary.recomposition_frequencies(f(angles).float()) for f in (torch.cos, torch.sin)
        )
        return cos, sin


class HPSv3Network(nn.Module):
    """Qwen2-VL without its language-model head, and the reward head."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.model = Qwen2VLModel(config)
        self.model.visual.rotary_pos_emb = _RoundedAngles(self.model.visual.rotary_pos_emb)
        frequencies = self.model.language_model.rotary_emb.inv_freq
        frequencies.copy_(frequencies.bfloat16())
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def forward(self, inputs: BatchFeature, reward_token: int) -> Tensor:
        """mu and log sigma ``[N, 2]`` at the last ``reward_token`` of each question."""
        ids: Tensor = inputs["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.model(
            **inputs, position_ids=positions.expand(3, *ids.shape), use_cache=False
        ).last_hidden_state
        # The prompt may contain the token too; the question ends with its own.
        last = ((ids == reward_token) * positions).argmax(1)
        outputs: Tensor = self.rm_head(hidden[torch.arange(len(ids)), last].float())
        return outputs


def network_key(key: str) -> str:
    """The name in :class:`HPSv3Network` of a parameter in the published file.

    The file may have the names of transformers before or after 4.52.
    """
    key = re.sub(r"^visual\.", "model.visual.", key)
    return re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", key)


def published_question(code: Path) -> Template:
    """The question in the authors' ``data_collator_qwen.py``: the two constants that it joins.

    Raises:
        UserError: the file cannot be parsed, or does not have them.
    """
    texts = {
        target.id: node.value.value
        for node in parsed(code).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    try:
        instruction = texts["INSTRUCTION"].replace("{text_prompt}", PLACEHOLDER)
        return Template.of(instruction + texts["prompt_with_special_token"])
    except KeyError as missing:
        raise UserError(
            f"{code}: has no text {missing}; fetch {QUESTION_ARTIFACT} again, or save the question "
            f"as {BESIDE_THE_MODEL} in the model's folder"
        ) from None


class HPSv3(BatchedReward):
    """mu of HPSv3, about -5 to 15; ``variant`` is the precision, by default ``bfloat16``.

    A ``source`` with a ``config.json`` also contains the processor and may contain the question.
    """

    name = "hpsv3"
    largest_aspect = QWEN_ASPECT

    def __init__(
        self,
        weights: Path,
        folder: Path,
        template: Template,
        dtype: str,
        device: torch.device | str,
        batch_size: int,
    ) -> None:
        super().__init__(device, batch_size, f"v3-{dtype}", sha256_file(weights))
        self.template, self.template_hash = template, template.sha256
        self.inputs = ChatInputs(folder, do_resize=False)
        tokenizer = self.inputs.tokenizer
        tokenizer.padding_side = "right"
        # Not a special token: those are plain text where they occur in a question.
        tokenizer.add_tokens([REWARD_TOKEN])
        self.reward_token = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        asked = self.inputs([Image.new("RGB", (28, 28))], [template.question("a cat")])
        if int((asked["input_ids"] == self.reward_token).sum()) != 1:
            raise UserError(f"{folder}: HPSv3's question must contain {REWARD_TOKEN} once")
        config = _read_config(folder)
        config.text_config.vocab_size = len(tokenizer)
        with accelerate.init_empty_weights():
            self.network = HPSv3Network(config)
        state = read_weights(weights, as_float32=False)
        renamed = {network_key(key): value for key, value in state.items()}
        load_state(self.network, renamed, weights, ("lm_head.",))
        self.network.model.to(self.device, getattr(torch, dtype))
        self.network.rm_head.to(self.device, torch.float32)

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """Loads the model; see :meth:`BatchedReward.load`."""
        dtype = choose_variant(config, DTYPES)
        source = config.source or PUBLISHED
        own = Path(source)
        beside = own / BESIDE_THE_MODEL
        template = (
            Template.read(beside)
            if beside.is_file()
            else published_question(fetched_file(QUESTION_ARTIFACT))
        )
        weights = locate(source, (WEIGHTS,), config.revision)
        whole = (own / "config.json").is_file()
        folder = own if whole else fetch_snapshot(PUBLISHED_BASE, _BASE_FILES, None)
        return cls(weights, folder, template, dtype, device, config.batch_size)

    def prepare(self, images: Sequence[Tensor], prompts: Sequence[str]) -> BatchFeature:
        questions = [self.template.question(prompt) for prompt in prompts]
        pictures = [_resized(*pair) for pair in zip(images, prompts, strict=True)]
        return self.inputs(pictures, questions)

    def evaluate(self, prepared: BatchFeature) -> Tensor:
        """Scores ``[B]``."""
        outputs: Tensor = self.network(prepared.to(self.device), self.reward_token)
        return outputs[:, 0]


def _read_config(folder: Path) -> Qwen2VLConfig:
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != "qwen2_vl":
        raise UserError(f"{folder}: config.json is not that of Qwen2-VL")
    return Qwen2VLConfig.from_dict(fields)


def _resized(image: Tensor, prompt: str) -> Image.Image:
    """A uint8 image ``[H, W, 3]`` of ``prompt`` at the size that the model was trained on."""
    height, width = image.shape[:2]
    try:
        size = smart_resize(height, width, min_pixels=PIXELS, max_pixels=PIXELS)
    except ValueError as error:
        raise cannot_score((width, height), prompt, error) from None
    return Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
