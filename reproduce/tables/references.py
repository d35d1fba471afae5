"""Citations: keys of ``references.bib`` by method, reward and metric."""

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.evaluation.metrics import DISTANCE, DRIFT, VENDI

BIBLIOGRAPHY = Path(__file__).with_name("references.bib")

METHODS: dict[str, tuple[str, ...]] = {
    "g2rpo": ("zhou2026g2rpo",),
    "dance_grpo": ("xue2025dancegrpo",),
    "mix_grpo": ("li2025mixgrpo",),
    "mix_grpo_flash": ("li2025mixgrpo", "lu2022dpmsolver"),
    "mix_grpo_flash_star": ("li2025mixgrpo", "lu2022dpmsolver"),
    "flow_grpo": ("liu2025flowgrpo",),
    "flow_grpo_fast": ("liu2025flowgrpo",),
    "flow_cps": ("wang2025cps", "liu2025flowgrpo"),
    "flow_dppo": ("ping2026flowdppo",),
    "grpo_guard": ("wang2025grpoguard", "liu2025flowgrpo"),
    "tempflow_grpo": ("he2025tempflow",),
    "branch_grpo": ("li2025branchgrpo",),
    "diffusion_nft": ("zheng2025nft",),
    "awm": ("xue2025awm",),
    "dgpo": ("luo2025dgpo",),
    "base": (),
    "checkpoint": (),
}
REWARDS: dict[str, tuple[str, ...]] = {
    "hps": ("wu2023hpsv2",),
    "clip": ("radford2021clip", "fang2023dfn"),
    "pick_score": ("kirstain2023pickapic",),
    "image_reward": ("xu2023imagereward",),
    "unified_reward": ("wang2025unifiedreward",),
    "hpsv3": ("ma2025hpsv3",),
    "aesthetic": ("schuhmann2022laion5b",),
    "vqa_score": ("lin2024vqascore",),
    "attributes": (),  # the mini world's own evaluator
}
MEASURES: dict[str, tuple[str, ...]] = {
    VENDI: ("friedman2022vendi",),
    DISTANCE: (),  # mean cosine distance
    DRIFT: (),
}
FOUNDATIONS = (
    "shao2024deepseekmath",
    "lipman2022flow",
    "song2020score",
    "blackforestlabs2024flux",
    "loshchilov2019adamw",
)
"""Behind every row: GRPO, flow matching and its SDE, the architecture, the optimizer."""
STATISTICS = (
    "agarwal2021precipice",
    "efron1987bootstrap",
    "holm1979multiple",
    "phipson2010permutation",
)
LIBRARIES = (
    "ansel2024pytorch",
    "vonplaten2022diffusers",
    "wolf2020transformers",
    "gugger2022accelerate",
    "ilharco2021openclip",
    "harris2020numpy",
    "virtanen2020scipy",
    "hunter2007matplotlib",
)
"""Libraries that compute and draw every number."""
ON_REQUEST = (
    "hu2021lora",
    "mangrulkar2022peft",  # the LoRA engine
    "liu2026gdpo",  # advantages normalised over the batch
    "wilson1927inference",  # raters' answers
)
"""Cited by single options: in the whole bibliography, but in no table's."""
PAPER = "zhou2026g2rpo"


def read_bibliography() -> dict[str, str]:
    """The BibTeX entries by key, in the order of the file."""
    found = re.finditer(r"^@\w+\{([^,\s]+),.*?^\}", BIBLIOGRAPHY.read_text(), re.S | re.M)
    return {entry[1]: entry[0] for entry in found}


def cited(methods: Iterable[str], rewards: Iterable[str], measures: Iterable[str]) -> list[str]:
    """The keys to cite for a table, without duplicates.

    Unknown names, such as a user's own method, are skipped.
    """
    keys = [
        *(key for name in methods for key in METHODS.get(name, ())),
        *(key for name in rewards for key in REWARDS.get(name, ())),
        *(key for name in measures for key in MEASURES.get(name, ())),
        *FOUNDATIONS,
        *STATISTICS,
        *LIBRARIES,
    ]
    return list(dict.fromkeys(keys))


def bibliography(keys: Iterable[str]) -> str:
    """The entries of ``keys`` as BibTeX."""
    entries = read_bibliography()
    return "\n\n".join(entries[key] for key in keys) + "\n"
