"""Small CLIP and T5 tokenizers with one token for each word of the mini world.

Every other character has a token too, so any prompt can be tokenized.
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from benchmarks.mini_world import world

START, END = "<|startoftext|>", "<|endoftext|>"
PADDING, STOP, UNKNOWN = "<pad>", "</s>", "<unk>"


def words() -> list[str]:
    """Every word of the captions, sorted."""
    grammar = world.GRAMMAR
    phrases = [
        *grammar.counts,
        *grammar.sizes,
        *grammar.colours,
        *grammar.shapes,
        *grammar.places,
        *grammar.relations,
        *grammar.backgrounds,
        "and",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})


def clip_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer like CLIP's, saved to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges(words())
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [token for token in dict.fromkeys(a + b for a, b in merges) if token not in tokens]
    tokens += [START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "unk_token": END,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _merges(texts: list[str]) -> list[tuple[str, str]]:
    """BPE merges that make one token of each word.

    Deterministic, unlike the trainer of ``tokenizers``, which breaks ties at random.
    """
    found: list[tuple[str, str]] = []
    pieces = [[*text[:-1], f"{text[-1]}</w>"] for text in texts]
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        for word in pieces:
            for place in range(len(word) - 1):
                if tuple(word[place : place + 2]) == best:
                    word[place : place + 2] = ["".join(best)]
    return found


def t5_tokenizer(folder: Path, length: int) -> T5TokenizerFast:
    """A unigram tokenizer like T5's, saved to ``folder``."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = [(PADDING, 0.0), (STOP, 0.0), (UNKNOWN, 0.0)]
    pieces += [("\u2581" + word, -1.0) for word in words() if len(word) > 1]
    pieces += [("\u2581", -4.0)]
    pieces += [(prefix + letter, -6.0) for letter in characters for prefix in ("", "\u2581")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {STOP}", pair=f"$A {STOP} $B {STOP}", special_tokens=[(STOP, 1)]
    )
    wrapped = T5TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        extra_ids=0,
        model_max_length=length,
    )
    wrapped.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def token_ids(tokenizer: Any, captions: Sequence[str], length: int) -> Tensor:
    """Token ids ``[N, length]``, padded and truncated."""
    ids: Tensor = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    ).input_ids
    return ids
