"""How long a graph of tasks takes on so many workers, predicted by list scheduling."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One stage as the prediction sees it.

    Attributes:
        seconds: how long it takes.
        needs: the tasks that must have ended before.
        slots: workers that it takes at once.
    """

    seconds: float
    needs: Sequence[str] = ()
    slots: int = 1


def schedule_wall(tasks: Mapping[str, Task], slots: int, start: float = 0.0) -> float:
    """Seconds until the last task ends.

    A free worker takes the first task of ``tasks``, in their order, of which all needs have ended;
    later ones do not overtake one that waits for more workers, as in a local run.

    Args:
        tasks: by name; a need that is not among them has ended already.
        slots: workers; a task that wants more takes all of them.
        start: seconds until the workers are ready.

    Raises:
        ValueError: tasks need each other in a circle.
    """
    place = {name: number for number, name in enumerate(tasks)}
    missing = {name: sum(n in tasks for n in set(task.needs)) for name, task in tasks.items()}
    followers: dict[str, list[str]] = {name: [] for name in tasks}
    for name, task in tasks.items():
        for need in set(task.needs) & tasks.keys():
            followers[need].append(name)
    names = list(tasks)
    ready = [place[name] for name, count in missing.items() if not count]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []
    now, free, ended = start, slots, 0
    while ready or running:
        while ready and free >= min(tasks[names[ready[0]]].slots, slots):
            number = heapq.heappop(ready)
            task = tasks[names[number]]
            free -= min(task.slots, slots)
            heapq.heappush(running, (now + task.seconds, number))
        now, number = heapq.heappop(running)
        name = names[number]
        free += min(tasks[name].slots, slots)
        ended += 1
        for follower in followers[name]:
            missing[follower] -= 1
            if not missing[follower]:
                heapq.heappush(ready, place[follower])
    if ended < len(tasks):
        raise ValueError("tasks need each other in a circle")
    return now if tasks else 0.0
