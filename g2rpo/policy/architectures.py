"""The architectures of policies, by the class of their diffusers pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from g2rpo.errors import UserError
from g2rpo.files import read_json

CLIP_TOKENIZER = (("tokenizer.json",), ("vocab.json", "merges.txt"))
T5_TOKENIZER = (("tokenizer.json",), ("spiece.model",))


@dataclass(frozen=True)
class Architecture:
    """What a pipeline folder holds, and the policy that is made of it.

    Attributes:
        policy: the policy's class, ``module:class``.
        size: its :class:`g2rpo.policy.size.ModelSize`, ``module:class``.
        tokenizers: of each tokenizer, by the ending of its folder's name (``tokenizer<ending>``),
            the sets of files of which it needs one; its encoder is ``text_encoder<ending>``.
        optional: endings of the encoders that a pipeline may leave out (null in its
            ``model_index.json``).
        classifier_free: whether ``policy.guidance_scale`` is that of classifier-free guidance;
            otherwise guidance is an input of the transformer, or there is none.
    """

    policy: str
    size: str
    tokenizers: Mapping[str, tuple[tuple[str, ...], ...]]
    optional: tuple[str, ...] = ()
    classifier_free: bool = False


ARCHITECTURES = {
    "FluxPipeline": Architecture(
        "g2rpo.policy.flux:FluxPolicy",
        "g2rpo.policy.flux_size:FluxSize",
        {"": CLIP_TOKENIZER, "_2": T5_TOKENIZER},
    ),
    "StableDiffusion3Pipeline": Architecture(
        "g2rpo.policy.sd3:SD3Policy",
        "g2rpo.policy.sd3_size:SD3Size",
        {"": CLIP_TOKENIZER, "_2": CLIP_TOKENIZER, "_3": T5_TOKENIZER},
        optional=("_3",),
        classifier_free=True,
    ),
}


def evaluations_per_velocity(pipeline: str, guidance_scale: float) -> int:
    """Forwards of the transformer (NFE) for one velocity: two with classifier-free guidance."""
    return 2 if ARCHITECTURES[pipeline].classifier_free and guidance_scale > 1 else 1


def pipeline_name(folder: Path) -> str:
    """The class of the diffusers pipeline in ``folder``.

    Raises:
        UserError: there is none, or none that a policy is made of.
    """
    index = folder / "model_index.json"
    known = " or ".join(ARCHITECTURES)
    if not index.is_file():
        raise UserError(
            f"{folder}: not a {known} folder: no model_index.json (create one with "
            f"{next(iter(ARCHITECTURES))}.save_pretrained)"
        )
    name = str(read_json(index).get("_class_name"))
    if name not in ARCHITECTURES:
        raise UserError(f"{folder}: a {name}, not a {known}; other models are not supported")
    return name


def text_endings(folder: Path) -> tuple[str, ...]:
    """The endings of the tokenizers and text encoders of the pipeline in ``folder``.

    Raises:
        UserError: see :func:`pipeline_name`.
    """
    architecture = ARCHITECTURES[pipeline_name(folder)]
    index = read_json(folder / "model_index.json")
    return tuple(
        ending
        for ending in architecture.tokenizers
        if ending not in architecture.optional
        or (index.get(f"text_encoder{ending}") or [None])[0] is not None
    )
