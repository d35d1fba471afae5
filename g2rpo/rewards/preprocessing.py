"""From 8-bit RGB images to a vision tower's input, exactly as each model was published.

Most models resize 8-bit images with Pillow; HPS's package resizes the float image and pads it. The
two differ by up to 0.2 after normalisation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from g2rpo.errors import UserError
from g2rpo.rewards.base import Images

Resize = Literal["shortest", "squash", "longest_padded"]


@dataclass(frozen=True)
class Preprocessing:
    """Resizes to ``size`` x ``size`` pixels (bicubic), scales to [0, 1] and normalises.

    ``resize`` is one of:

    - ``shortest``: shortest side to ``size``, then the centre is cropped (8-bit, Pillow);
    - ``squash``: both sides to ``size`` (8-bit, Pillow);
    - ``longest_padded``: longest side to ``size``, then black borders (float), as hpsv2 does.
    """

    size: int
    resize: Resize = "shortest"
    mean: Sequence[float] = OPENAI_DATASET_MEAN
    std: Sequence[float] = OPENAI_DATASET_STD

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any], size: int, where: str) -> "Preprocessing":
        """Reads the ``preprocess_cfg`` of an open_clip model."""
        resize = config.get("resize_mode", "shortest")
        if resize not in get_args(Resize) or config.get("interpolation", "bicubic") != "bicubic":
            raise UserError(f"{where}: preprocessing must be bicubic and one of {get_args(Resize)}")
        mean = tuple(config.get("mean", OPENAI_DATASET_MEAN))
        return cls(size, resize, mean, tuple(config.get("std", OPENAI_DATASET_STD)))

    def __call__(self, images: Images) -> Tensor:
        """N uint8 images of any size to float32 ``[N, 3, size, size]`` on the CPU."""
        pixels = torch.stack([self._one(image) for image in images])
        normalised: Tensor = transforms.normalize(pixels, list(self.mean), list(self.std))
        return normalised

    def _one(self, image: Tensor) -> Tensor:
        """uint8 ``[H, W, 3]`` to float32 ``[3, size, size]``, not normalised."""
        padded = self.resize == "longest_padded"
        if not padded and tuple(image.shape[:2]) != (self.size, self.size):
            image = self._resize_8_bit(image)
        pixels = image.permute(2, 0, 1).float() / 255
        return self._resize_and_pad(pixels) if padded else pixels

    def _resize_8_bit(self, image: Tensor) -> Tensor:
        size = self.size if self.resize == "shortest" else [self.size, self.size]
        picture = Image.fromarray(image.numpy())
        picture = transforms.resize(picture, size, InterpolationMode.BICUBIC)
        picture = transforms.center_crop(picture, [self.size, self.size])
        return torch.from_numpy(np.asarray(picture).copy())

    def _resize_and_pad(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self.size / max(height, width)
        if scale == 1.0:
            # The package neither resizes nor pads such an image, so cannot batch non-square ones.
            new_height, new_width = height, width
        else:
            new_height, new_width = round(height * scale), round(width * scale)
            pixels = transforms.resize(
                pixels, [new_height, new_width], InterpolationMode.BICUBIC, antialias=True
            )
        rows, columns = self.size - new_height, self.size - new_width
        borders = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
        return transforms.pad(pixels, borders, fill=0) if any(borders) else pixels
