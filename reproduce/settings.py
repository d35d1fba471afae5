"""Settings laid flat, and which of them tell a run from the others of its method.

Nothing here imports a model library: runs are listed on login nodes.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

NOT_DETERMINING = ("validation", "pictures", "checkpoints", "execution")
"""Sections of a training configuration that do not change the trained weights."""


def without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What runs share that are one method at several seeds."""
    apart = ("seed", *NOT_DETERMINING)
    return {name: value for name, value in settings.items() if name not in apart}


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys; text as it is, all else as JSON."""
    if isinstance(value, Mapping) and (value or not prefix):
        return {
            key: text
            for name, inner in value.items()
            for key, text in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def distinctions(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What tells each run from the others of its method and rewards, which its name holds too.

    Args:
        settings: the training configuration of each run, by its name.

    Returns:
        For each run the settings, but for the seed, in which it is not like most of its kind, as
        ``group_size 24, eta 0.3``; empty where it is like most in all of them.
    """
    kinds: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for name, config in settings.items():
        values = flat(without_seed(config))
        rewards = config.get("rewards", {})
        kind = (values.get("method.name", ""), *sorted(rewards))
        kinds.setdefault(kind, {})[name] = values
    return {name: text for runs in kinds.values() for name, text in _within(runs).items()}


def _within(runs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The distinctions of the runs of one kind: values that no more than half of them have."""
    keys = dict.fromkeys(key for values in runs.values() for key in values)
    counts = {key: Counter(values.get(key) for values in runs.values()) for key in keys}
    names = _short(key for key, count in counts.items() if len(count) > 1)
    return {
        run: ", ".join(
            f"{short} {values.get(key, 'none')}"
            for key, short in names.items()
            if 2 * counts[key][values.get(key)] <= len(runs)
        )
        for run, values in runs.items()
    }


def _short(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where two end alike."""
    ends = {key: key.rsplit(".", 1)[-1] for key in keys}
    counts = Counter(ends.values())
    return {key: end if counts[end] == 1 else key for key, end in ends.items()}
