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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from g2rpo.flow.rollout_tree import RolloutTree
from g2rpo.flow.sweep import Key
from g2rpo.flow.upload import indices
from g2rpo.policy.config import StepCacheConfig


@dataclass(frozen=True)
class _Entry:
    """What is remembered of an evaluated state: the signal and what the blocks added."""

    signal: Tensor
    residual: Tensor


class StepCache:
    """The memory of one walk over a tree.

    Attributes:
        keys: the states of the batch that is evaluated next.
        reused: how many states were answered from memory.
    """

    def __init__(self, config: StepCacheConfig, tree: RolloutTree) -> None:
        self.config, self.tree = config, tree
        self.keys: Sequence[Key] = ()
        self._answered: set[Key] = set()
        self._entries: dict[Key, _Entry] = {}
        self._last_use = _last_uses(tree)

    @property
    def reused(self) -> int:
        """See the class."""
        return len(self._answered)

    def before(self) -> list[_Entry | None]:
        """For each state of the batch, what is remembered of the one it was reached from."""
        found = []
        for prompt, state in self.keys:
            parent = self.tree.states[state].parent
            found.append(None if parent is None else self._entries.get((prompt, parent)))
        return found

    def keep(self, place: int, entry: _Entry, *, reused: bool) -> None:
        """Remembers ``entry`` for a state of the batch, if another one will be reached from it."""
        key = self.keys[place]
        (self._answered.add if reused else self._answered.discard)(key)
        if key[1] in self._last_use:
            self._entries[key] = entry

    def passed(self, node: int) -> None:
        """Forgets what no node after ``node`` can use."""
        for key in [key for key in self._entries if self._last_use[key[1]] <= node]:
            del self._entries[key]


def _last_uses(tree: RolloutTree) -> dict[int, int]:
    """The last node at which a state that was reached from each state is itself evaluated."""
    last: dict[int, int] = {}
    for state in tree.states:
        if state.parent is not None and state.node < tree.steps:
            last[state.parent] = max(last.get(state.parent, 0), state.node)
    return last


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
        remembered = self.cache.before()
        reused = self._unchanged(signal, remembered)
        result = torch.empty_like(image)
        for place, entry in reused.items():
            torch.add(image[place], entry.residual, out=result[place])
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
                self.cache.keep(place, _Entry(signal[place], added[row]), reused=False)
        return encoder_hidden_states, result

    def _unchanged(self, signal: Tensor, remembered: list[_Entry | None]) -> dict[int, _Entry]:
        """The states whose signal is nearly the remembered one, with what is remembered."""
        known = {place: entry for place, entry in enumerate(remembered) if entry is not None}
        if not known:
            return {}
        before = torch.stack([entry.signal for entry in known.values()])
        now = signal[indices(list(known), signal.device)]
        change = (now - before).flatten(1).abs().mean(1, dtype=torch.float32)
        size = before.flatten(1).abs().mean(1, dtype=torch.float32)
        below = (change < self.cache.config.threshold * size).tolist()
        return {
            place: entry
            for (place, entry), unchanged in zip(known.items(), below, strict=True)
            if unchanged
        }
