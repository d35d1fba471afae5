"""The nodes of a continuation at a denoising granularity (Multi-Granularity Advantage)."""


def continuation_nodes(step: int, granularity: int, steps: int) -> tuple[int, ...]:
    """Nodes at which a branch of ``step`` evaluates the velocity on its way to the image.

    The list is L = [k+1] + [k+2, k+2+granularity, ... <= T]: the first step after the branch is
    never strided. Velocities are evaluated at L without its last element, and the last evaluated
    node jumps to sigma = 0 (its x_0 prediction is the image). For T = 16 and k = 0, granularity 2
    gives 1, 2, 4, 6, 8, 10, 12, 14, and granularity 3 gives 1, 2, 5, 8, 11.

    Args:
        step: k, the index of the stochastic step, 0 <= k <= T - 2.
        granularity: the stride, at least 1.
        steps: T.

    Raises:
        ValueError: the step leaves nothing to evaluate (k >= T - 1), or a value is out of range.
    """
    if granularity < 1:
        raise ValueError(f"granularity {granularity} must be at least 1")
    if not 0 <= step <= steps - 2:
        raise ValueError(
            f"stochastic step {step} leaves no velocity evaluation after its branch; "
            f"with {steps} steps it must be between 0 and {steps - 2}"
        )
    return (step + 1, *range(step + 2, steps + 1, granularity))[:-1]


def coinciding_granularities(
    stochastic_steps: tuple[int, ...], granularities: tuple[int, ...], steps: int
) -> list[tuple[int, int, int]]:
    """(step, first, second) wherever two granularities visit the same nodes."""
    coinciding = []
    for step in stochastic_steps:
        seen: dict[tuple[int, ...], int] = {}
        for granularity in granularities:
            nodes = continuation_nodes(step, granularity, steps)
            if nodes in seen:
                coinciding.append((step, seen[nodes], granularity))
            else:
                seen[nodes] = granularity
    return coinciding
