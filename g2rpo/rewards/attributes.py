"""The attribute reward: the share of a caption's attributes that an image shows.

The mini world's counterpart of UnifiedReward: an evaluator independent of the CLIP-like rewards.
A small convolutional network predicts the shape, colour and size in every cell of the layout, and
the background; a :class:`Grammar` parses the caption; the score is the share of the caption's
attributes that agree, in [0, 1]. The folder contains config.json (the world and the network) and
model.safetensors.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from g2rpo.config import StrictModel, validate
from g2rpo.errors import UserError
from g2rpo.files import read_json, sha256_file, write_json
from g2rpo.rewards.attribute_grammar import Grammar, Reading, Scene, Shown
from g2rpo.rewards.base import BatchedReward, RewardConfig
from g2rpo.rewards.weights import load_state, locate, read_weights

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class ReaderConfig(StrictModel):
    """The network's classes and size."""

    version: str
    resolution: int
    """Side of the square input; other images are stretched to it."""
    layout: tuple[int, int]
    """Rows and columns of cells."""
    shapes: list[str]
    colours: list[str]
    sizes: list[str]
    backgrounds: list[str]
    widths: list[int]
    """Channels of the convolutions; each but the first halves the resolution."""
    grammar: Grammar


class AttributeReader(nn.Module):
    """Classifies every cell of an image, and its background."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = 3
        for index, width in enumerate(config.widths):
            layers += [
                nn.Conv2d(channels, width, 3, stride=1 if index == 0 else 2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            channels = width
        self.body = nn.Sequential(*layers)
        side = config.resolution // 2 ** (len(config.widths) - 1)
        rows, columns = config.layout
        window = (side // rows, side // columns)
        self.classes = (len(config.shapes) + 1, len(config.colours), len(config.sizes))
        self.cells = nn.Conv2d(channels, 2 * channels, window, stride=window)
        self.cell_head = nn.Conv2d(2 * channels, sum(self.classes), 1)
        self.background_head = nn.Linear(2 * channels, len(config.backgrounds))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Class scores of float32 pixels ``[B, 3, H, W]`` in [-1, 1].

        Returns:
            shapes ``[B, cells, 1 + shapes]`` (class 0 is no shape), colours, sizes, and
            backgrounds ``[B, backgrounds]``.
        """
        cells = nn.functional.silu(self.cells(self.body(pixels)))
        parts = self.cell_head(cells).flatten(2).transpose(1, 2).split(self.classes, dim=2)
        return parts[0], parts[1], parts[2], self.background_head(cells.mean((2, 3)))

    def read(self, images: Tensor) -> list[Reading]:
        """The scenes shown by uint8 images ``[B, H, W, 3]``."""
        return self.readings(self.prepare(images))

    @torch.no_grad()
    def readings(self, pixels: Tensor) -> list[Reading]:
        """The scenes shown by pixels ``[B, 3, side, side]`` (see :meth:`prepare`)."""
        scores = self(pixels.to(self.background_head.weight))
        shapes, colours, sizes, backgrounds = (part.argmax(-1).cpu().tolist() for part in scores)
        config = self.config
        return [
            Reading(
                tuple(
                    Shown(config.colours[c], config.shapes[s - 1], config.sizes[z]) if s else None
                    for s, c, z in zip(shapes[i], colours[i], sizes[i], strict=True)
                ),
                config.backgrounds[backgrounds[i]],
            )
            for i in range(len(pixels))
        ]

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 ``[B, H, W, 3]`` to float32 ``[B, 3, side, side]`` in [-1, 1]."""
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        side = (self.config.resolution, self.config.resolution)
        if pixels.shape[2:] != side:
            pixels = nn.functional.interpolate(pixels, side, mode="bilinear", antialias=True)
        return pixels

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, self.config.model_dump(mode="json"))
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)

    @staticmethod
    def read_config(folder: Path) -> ReaderConfig:
        """Reads config.json in ``folder``.

        Raises:
            UserError: it is missing or invalid.
        """
        where = locate(str(folder), [CONFIG_FILE])
        return validate(ReaderConfig, read_json(where), str(where))

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Loads what :meth:`save` wrote, frozen and in evaluation mode.

        Raises:
            UserError: a file is missing or does not fit.
        """
        reader = cls(cls.read_config(folder))
        weights = locate(str(folder), [WEIGHTS_FILE])
        load_state(reader, read_weights(weights), weights)
        return reader.eval()


class AttributeReward(BatchedReward):
    """The attribute reward, from a folder with an :class:`AttributeReader`."""

    name: ClassVar[str] = "attributes"

    def __init__(
        self, reader: AttributeReader, device: torch.device | str, batch_size: int, hashed: str
    ) -> None:
        super().__init__(device, batch_size, reader.config.version, hashed)
        self.reader = reader.to(self.device)
        self.scene_of = functools.lru_cache(maxsize=4096)(reader.config.grammar.parse)

    @classmethod
    def load(cls, config: RewardConfig, device: torch.device | str) -> Self:
        """See :meth:`BatchedReward.load`; ``source`` must be a folder, there is no default."""
        if config.source is None:
            raise UserError(
                "reward attributes: no model is published; set source to a folder, such as the "
                "mini world's"
            )
        folder = Path(config.source)
        reader = AttributeReader.from_folder(folder)
        return cls(reader, device, config.batch_size, sha256_file(folder / WEIGHTS_FILE))

    @classmethod
    def unscorable(cls, config: RewardConfig, prompts: Iterable[str]) -> dict[str, str]:
        if config.source is None:  # as `load` says
            return {}
        grammar = AttributeReader.read_config(Path(config.source)).grammar
        found = {}
        for prompt in dict.fromkeys(prompts):
            try:
                grammar.parse(prompt)
            except UserError as error:
                found[prompt] = str(error)
        return found

    def prepare(
        self, images: Sequence[Tensor], prompts: Sequence[str]
    ) -> tuple[Tensor, list[Scene]]:
        pixels = torch.cat([self.reader.prepare(image[None]) for image in images])
        return pixels, [self.scene_of(prompt) for prompt in prompts]

    def evaluate(self, prepared: tuple[Tensor, list[Scene]]) -> Tensor:
        """The share of agreeing attributes, ``[B]``."""
        pixels, scenes = prepared
        grammar = self.reader.config.grammar
        readings = self.reader.readings(pixels)
        shares = [
            share(grammar, scene, reading) for scene, reading in zip(scenes, readings, strict=True)
        ]
        return torch.tensor(shares, dtype=torch.float32)


def share(grammar: Grammar, scene: Scene, reading: Reading) -> float:
    """The share of the attributes of ``scene`` that an image shows, in [0, 1]."""
    agreeing, total = grammar.agreement(scene, reading)
    return agreeing / total
