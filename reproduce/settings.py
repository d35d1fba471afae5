"""Flattened settings, and those that distinguish a run from others of its method.

Nothing here imports a model library: runs are listed on login nodes.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 4
"""At most so many settings distinguish a run in a list; ``g2rpo compare`` prints all of them."""
NOT_DETERMINING = ("validation", "pictures", "checkpoints", "execution")
"""Sections of the training configuration that do not change the trained weights."""


def without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that runs of one method at several seeds have in common."""
    apart = ("seed", *NOT_DETERMINING)
    return {name: value for name, value in settings.items() if name not in apart}


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys; strings as they are, other values as JSON."""
    if isinstance(value, Mapping) and (value or not prefix):
        return {
            key: text
            for name, inner in value.items()
            for key, text in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def distinctions(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The settings that distinguish each run from others of its method and rewards.

    Args:
        settings: the training configuration of each run by name.

    Returns:
        For each run, the settings other than the seed that at most half of its kind share, e.g.
        ``group_size 24, eta 0.3``, the first four of them; may be empty.
    """
    kinds: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for name, config in settings.items():
        values = flat(without_seed(config))
        rewards = config.get("rewards", {})
        kind = (values.get("method.name", ""), *sorted(rewards))
        kinds.setdefault(kind, {})[name] = values
    return {name: text for runs in kinds.values() for name, text in _within(runs).items()}


def _within(runs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The distinctions of runs of one kind: values that at most half of them have."""
    keys = dict.fromkeys(key for values in runs.values() for key in values)
    counts = {key: Counter(values.get(key) for values in runs.values()) for key in keys}
    names = _short(key for key, count in counts.items() if len(count) > 1)
    found = {
        run: [
            f"{short} {values.get(key, 'none')}"
            for key, short in names.items()
            if 2 * counts[key][values.get(key)] <= len(runs)
        ]
        for run, values in runs.items()
    }
    return {
        run: ", ".join(texts[:SHOWN])
        + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")
        for run, texts in found.items()
    }


def _short(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key but ``name``, or all of it if two keys end alike."""
    ends = {key: key.removesuffix(".name").rsplit(".", 1)[-1] for key in keys}
    counts = Counter(ends.values())
    return {key: end if counts[end] == 1 else key for key, end in ends.items()}
