"""The packages of the reward models, called as their documentation or model page has it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from benchmarks.speed import reward_files as files
from benchmarks.speed.packages import hpsv2_package, image_reward_package
from g2rpo.rewards.hps import CHECKPOINTS
from g2rpo.rewards.image_reward import MED_CONFIG
from g2rpo.rewards.open_clip_reward import WEIGHTS_FILES
from g2rpo.rewards.pick_score import image_features, text_features
from g2rpo.rewards.weights import load_tokenizer


@dataclass(frozen=True)
class Work:
    """What is scored: N images of P prompts, the images of a prompt next to each other.

    Attributes:
        size: of the models.
        images: uint8 [N, H, W, 3].
        prompts: one for each image.
        groups: P.
        device: where.
        sample: at most so many calls of a package are timed; None is all.
    """

    size: files.Size
    images: Tensor
    prompts: list[str]
    groups: int
    device: torch.device
    sample: int | None

    @property
    def pairs(self) -> list[tuple[Image.Image, str]]:
        """Each image as the packages take it, with its prompt."""
        pictures = [Image.fromarray(image.numpy()) for image in self.images]
        return list(zip(pictures, self.prompts, strict=True))

    @property
    def per_group(self) -> int:
        """Images of one prompt."""
        return len(self.images) // self.groups


@dataclass(frozen=True)
class Rival:
    """One way to score all images: calls that together give every score, in order.

    Attributes:
        name: for the table.
        calls: each takes equally many images.
        autocast: whether the package computes in float16 on a GPU.
    """

    name: str
    calls: Sequence[Callable[[], Sequence[float]]]
    autocast: bool = False


@contextmanager
def hps_rivals(folder: Path, work: Work) -> Iterator[list[Rival]]:
    """``hpsv2.score``, which reads its checkpoint at every call, and its model read once."""
    checkpoint = folder / CHECKPOINTS["v2.1"]
    with hpsv2_package(checkpoint, work.device, files.small_architecture(work.size)) as hpsv2:
        from hpsv2 import img_score

        tokenize, pairs = img_score.get_tokenizer(files.HPS_NAME), work.pairs

        def documented(start: int) -> list[float]:
            group = pairs[start : start + work.per_group]
            pictures = [picture for picture, _ in group]
            return [float(s) for s in hpsv2.score(pictures, group[0][1], hps_version="v2.1")]

        def one(picture: Image.Image, prompt: str) -> list[float]:
            # The body of its loop, on the model that the calls before have left.
            model = img_score.model_dict["model"]
            pixels = img_score.model_dict["preprocess_val"](picture)[None].to(work.device)
            with torch.no_grad(), torch.cuda.amp.autocast():
                out = model(pixels, tokenize([prompt]).to(work.device))
                logits = out["image_features"] @ out["text_features"].T
            return [float(logits.diagonal()[0])]

        starts = range(0, len(work.images), work.per_group)
        yield [
            Rival("hpsv2.score", [partial(documented, s) for s in starts], autocast=True),
            Rival("hpsv2's model, by image", _by_image(work, one), autocast=True),
        ]


@contextmanager
def clip_rivals(folder: Path, work: Work) -> Iterator[list[Rival]]:
    """The loop of the model's page: ``create_model_from_pretrained``, encode, normalise."""
    model, preprocess = open_clip.create_model_from_pretrained(
        files.CLIP_NAME,
        pretrained=str(folder / WEIGHTS_FILES[0]),
        image_resize_mode=files.CLIP_RESIZE,
        device=work.device,
    )
    model.eval()
    tokenize = open_clip.get_tokenizer(files.CLIP_NAME)

    def one(picture: Image.Image, prompt: str) -> list[float]:
        with torch.no_grad():
            of_image = model.encode_image(preprocess(picture)[None].to(work.device))
            of_text = model.encode_text(tokenize([prompt]).to(work.device))
            normalised = (nn.functional.normalize(f, dim=-1) for f in (of_image, of_text))
            first, second = normalised
        return [float((first @ second.T)[0, 0])]

    yield [Rival("open_clip, by image", _by_image(work, one))]


@contextmanager
def pick_score_rivals(folder: Path, work: Work) -> Iterator[list[Rival]]:
    """The loop of the model's page: processor and CLIPModel."""
    model = CLIPModel.from_pretrained(folder).eval().to(work.device)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def one(picture: Image.Image, prompt: str) -> list[float]:
        pixels = processor(images=[picture], return_tensors="pt").pixel_values
        text = tokenizer(
            prompt, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(work.device)
        with torch.no_grad():
            of_image = image_features(model, pixels.to(work.device))
            of_text = text_features(model, text.input_ids, text.attention_mask)
            return [float(model.logit_scale.exp() * (of_text @ of_image.T)[0, 0])]

    yield [Rival("transformers, by image", _by_image(work, one))]


@contextmanager
def image_reward_rivals(folder: Path, work: Work) -> Iterator[list[Rival]]:
    """``ImageReward.load`` and ``model.score(prompt, image)``."""
    vision = None if work.size == "full" else files.image_reward_vision(work.size)
    with image_reward_package(load_tokenizer(folder), vision) as package:
        model = package.load(
            str(folder / "ImageReward.pt"),
            device=work.device,
            med_config=str(folder / MED_CONFIG),
        )

        def one(picture: Image.Image, prompt: str) -> list[float]:
            with torch.no_grad():
                return [float(model.score(prompt, picture))]

        yield [Rival("ImageReward's score, by image", _by_image(work, one))]


def _by_image(
    work: Work, one: Callable[[Image.Image, str], list[float]]
) -> list[Callable[[], list[float]]]:
    return [partial(one, *pair) for pair in work.pairs]
