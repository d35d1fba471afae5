"""A step cache: where a block stack changes little along a trajectory, what it added is reused.

The transformer's blocks turn the embedded tokens h into h + r. At a state whose predecessor on the
trajectory has a remembered r, and whose signal (below) differs from the one remembered with it by
less than a threshold, r is taken from there and the blocks are not run. The decision is a state's
own, so it does not depend on the batch; it costs one small read from the device per batch.

diffusers' ``enable_cache`` is not used: its first-block cache keeps one residual per cache context
and decides once for a whole batch, and its other caches count the calls of a context. The states of
a batch here belong to trajectories of different lengths, strides and pasts.
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
"""Of an evaluated state: its signal and what the blocks added."""


class StepCache:
    """The memory of one walk over a rollout tree.

    Attributes:
        keys: the states of the batch that is evaluated next.
        reused: the states that were answered from memory.
        entries: what is remembered of those that others will be reached from.
    """

    def __init__(self, config: StepCacheConfig, tree: RolloutTree) -> None:
        self.config, self.tree = config, tree
        self.keys: Sequence[Key] = ()
        self.reused: set[Key] = set()
        self.entries: dict[Key, Entry] = {}
        # The last node at which a state that was reached from each state is itself evaluated.
        self._last_use: dict[int, int] = {}
        for state in tree.states:
            if state.parent is not None and state.node < tree.steps:
                last = self._last_use.get(state.parent, 0)
                self._last_use[state.parent] = max(last, state.node)

    def before(self) -> dict[int, Entry]:
        """What is remembered of the states that those of the batch were reached from, by place."""
        found = {}
        for place, (prompt, state) in enumerate(self.keys):
            parent = self.tree.states[state].parent
            if parent is not None and (prompt, parent) in self.entries:
                found[place] = self.entries[prompt, parent]
        return found

    def keep(self, place: int, entry: Entry, *, reused: bool) -> None:
        """Remembers ``entry`` for a state of the batch, if another one will be reached from it."""
        key = self.keys[place]
        (self.reused.add if reused else self.reused.discard)(key)
        if key[1] in self._last_use:
            self.entries[key] = entry

    def passed(self, node: int) -> None:
        """Forgets what no node after ``node`` can use."""
        for key in [key for key in self.entries if self._last_use[key[1]] <= node]:
            del self.entries[key]


class CachedBlocks(nn.Module):
    """All blocks of the transformer as one, with a :class:`StepCache` between them.

    Attributes:
        cache: the memory of the walk that is under way.
    """

    cache: StepCache

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
        """A FLUX block's arguments and results; the text's result is of no use to what follows."""
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
        """Those of ``known`` whose state has nearly the signal that is remembered."""
        if not known:
            return {}
        before = torch.stack([remembered for remembered, _ in known.values()])
        now = signal[indices(list(known), signal.device)]
        change = (now - before).flatten(1).abs().mean(1, dtype=torch.float32)
        size = before.flatten(1).abs().mean(1, dtype=torch.float32)
        below = (change < self.cache.config.threshold * size).tolist()
        return {place: known[place] for place, near in zip(known, below, strict=True) if near}
