"""A step cache: reuses the residual of the block stack when it changes little along a trajectory.

The transformer's blocks turn the embedded tokens h into h + r. If the predecessor of a state has a
cached r, and the state's signal (below) differs from the cached one by less than a threshold, that
r is reused and the blocks are skipped. Each state decides on its own, so the result does not depend
on the batch; the decision costs one small read from the device per batch.

diffusers' ``enable_cache`` does not fit: its first-block cache keeps one residual per cache context
and decides once for a whole batch, and its other caches count the calls of a context. The states of
a batch here belong to trajectories of different lengths, strides and histories.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.sweep import Key
from g2rpo.flow.upload import indices
from g2rpo.policy.config import StepCacheConfig

Entry = tuple[Tensor, Tensor]
"""The signal of an evaluated state and the residual of its blocks."""


class StepCache:
    """The cache of one walk over a rollout tree.

    Attributes:
        keys: the states of the next batch.
        reused: the states answered from the cache.
        entries: the cached states that others will be reached from.
    """

    def __init__(self, config: StepCacheConfig, tree: RolloutTree) -> None:
        self.config, self.tree = config, tree
        self.keys: Sequence[Key] = ()
        self.reused: set[Key] = set()
        self.entries: dict[Key, Entry] = {}
        # For each state, the last node at which one of its successors is evaluated.
        self._last_use: dict[int, float] = {}
        for state in tree.states:
            if state.parent is not None and state.node < tree.steps:
                last = self._last_use.get(state.parent, 0)
                self._last_use[state.parent] = max(last, state.node)

    def before(self) -> dict[int, Entry]:
        """The cached entries of the batch's predecessors, by place in the batch."""
        entries = {}
        for place, (prompt, state) in enumerate(self.keys):
            parent = self.tree.states[state].parent
            if parent is not None and (prompt, parent) in self.entries:
                entries[place] = self.entries[prompt, parent]
        return entries

    def keep(self, place: int, entry: Entry, *, reused: bool) -> None:
        """Caches ``entry`` for a state of the batch if another one will be reached from it."""
        key = self.keys[place]
        (self.reused.add if reused else self.reused.discard)(key)
        if key[1] in self._last_use:
            self.entries[key] = entry

    def passed(self, node: float) -> None:
        """Drops what no node after ``node`` can use."""
        for key in [key for key in self.entries if self._last_use[key[1]] <= node]:
            del self.entries[key]


class CachedBlocks(nn.Module):
    """All the transformer's blocks as one, skipped when a :class:`StepCache` has their residual."""

    cache: StepCache
    """The cache of the current walk."""

    def __init__(self, blocks: Sequence[nn.Module], kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes a FLUX block's arguments; of its results, the text's is not used afterwards."""
        shared = (image_rotary_emb, joint_attention_kwargs)
        text, image = encoder_hidden_states, hidden_states
        rest = list(self.blocks)
        if self.kind == "first_block":
            text, image = rest.pop(0)(image, text, temb, *shared)
            signal = image - hidden_states
        else:
            norm: Any = rest[0].norm1
            signal = norm.linear(norm.silu(temb))
        reused = self._unchanged(signal, self.cache.before())
        result = torch.empty_like(image)
        for place, entry in reused.items():
            torch.add(image[place], entry[1], out=result[place])
            self.cache.keep(place, entry, reused=True)
        computed = [place for place in range(len(image)) if place not in reused]
        if computed:
            chosen = indices(computed, image.device)
            tokens, text, temb = image[chosen], text[chosen], temb[chosen]
            for block in rest:
                text, tokens = block(tokens, text, temb, *shared)
            result.index_copy_(0, chosen, tokens)
            added = tokens - image[chosen]
            for row, place in enumerate(computed):
                self.cache.keep(place, (signal[place], added[row]), reused=False)
        return encoder_hidden_states, result

    def _unchanged(self, signal: Tensor, known: dict[int, Entry]) -> dict[int, Entry]:
        """Those of ``known`` whose state has nearly the cached signal."""
        if not known:
            return {}
        before = torch.stack([remembered for remembered, _ in known.values()])
        now = signal[indices(list(known), signal.device)]
        change = (now - before).flatten(1).abs().mean(1, dtype=torch.float32)
        size = before.flatten(1).abs().mean(1, dtype=torch.float32)
        below = (change < self.cache.config.threshold * size).tolist()
        return {place: known[place] for place, near in zip(known, below, strict=True) if near}
