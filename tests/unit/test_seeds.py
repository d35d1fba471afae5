"""Counter-based draws: the key alone decides, and prompts are permuted epoch by epoch."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from g2rpo.data.prompts import Prompt, prompts_of_iteration
from g2rpo.errors import UserError
from g2rpo.seeds import gaussian, generator, permutation

GOLDEN_NOISE = (1.9817665, -0.46012923, -1.2540259)
GOLDEN_ORDER = [5, 0, 2, 3, 1, 4]

# --- draws ---------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_key_alone() -> None:
    keys = [(iteration, f"{prompt:06d}", 3, 5) for iteration in range(4) for prompt in range(4)]
    forward = {key: gaussian((2, 3), 42, "step-noise", *key) for key in keys}
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    for key in reversed(keys):
        generator(42, "other", *key).standard_normal(11)
        again = gaussian((2, 3), 42, "step-noise", *key)
        assert torch.equal(again, forward[key])
        torch.rand(5)


def test_draws_do_not_change_between_versions() -> None:
    # Every stored result rests on these numbers; they were recorded once.
    noise = gaussian((3,), 42, "initial-noise", 1, "000003", 0, -1)
    torch.testing.assert_close(noise, torch.tensor(GOLDEN_NOISE), rtol=1e-6, atol=0)
    assert permutation(6, 1, "order", 2) == GOLDEN_ORDER


def test_distinct_keys_are_distinct_draws() -> None:
    names: list[tuple[int, str, tuple[int | str, ...]]] = [
        (1, "a", ()),
        (2, "a", ()),
        (-1, "a", ()),
        (2**70, "a", ()),
        (1, "b", ()),
        (1, "a", (1,)),
        (1, "a", ("1",)),
        (1, "a", (11,)),
        (1, "a", (1, 1)),
        (1, "a", ("1", 1)),
        (1, "a", ("1, 1",)),
        (1, "a", ("1', '1",)),
        (1, "a", ("1", "1")),
        (1, "a", (-1,)),
        (1, "a', '1", ()),
        (1, "a", ("",)),
        (1, "", ("a",)),
        (1, "a", (0,)),
    ]
    draws = {tuple(gaussian((4,), seed, stream, *key).tolist()) for seed, stream, key in names}
    assert len(draws) == len(names)


def test_numpy_numbers_and_strings_are_the_same_key() -> None:
    expected = gaussian((4,), 1, "s", 3, "p", -1)
    assert torch.equal(gaussian((4,), np.int64(1), "s", np.int32(3), np.str_("p"), -1), expected)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        gaussian((4,), 1, "s", 3.5)  # type: ignore[arg-type]


def test_gaussian_noise_is_standard_normal() -> None:
    noise = gaussian((40, 50, 50), 3, "initial-noise", 0, "p", 0, -1)
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    values = noise.double().flatten().numpy()
    count = len(values)
    assert abs(values.mean()) < 4 / count**0.5
    assert abs(values.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs(stats.kurtosis(values)) < 4 * (24 / count) ** 0.5
    assert stats.kstest(values, "norm").pvalue > 1e-3


def test_draws_of_neighbouring_keys_are_uncorrelated() -> None:
    rows = torch.stack(
        [gaussian((4000,), 3, "step-noise", i, "p", s) for i in range(5) for s in range(5)]
    )
    correlation = torch.corrcoef(rows.double())
    off_diagonal = correlation[~torch.eye(25, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 5 / 4000**0.5
    # The same holds between the first numbers of many keys.
    firsts = np.array([float(gaussian((1,), 3, "step-noise", i)) for i in range(2000)])
    assert abs(firsts.mean()) < 4 / 2000**0.5
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 4 / 2000**0.5


def test_permutations_are_permutations_and_differ() -> None:
    found = [permutation(12, seed, "order", epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(12)) for order in found)
    assert len({tuple(order) for order in found}) == 9


# --- prompts of an iteration ---------------------------------------------------------------------


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"{number:06d}", f"prompt {number}") for number in range(count)]


@pytest.mark.parametrize(("size", "count"), [(12, 4), (13, 4), (5, 5), (7, 1), (9, 5)])
def test_prompts_are_distinct_in_an_iteration_and_epochs_permute(size: int, count: int) -> None:
    pool, per_epoch = prompts(size), size // count
    orders = []
    for epoch in range(4):
        seen = []
        for iteration in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            chosen = prompts_of_iteration(pool, count, 42, iteration)
            assert len({prompt.id for prompt in chosen}) == len(chosen) == count
            seen += chosen
        assert len({prompt.id for prompt in seen}) == per_epoch * count
        orders.append(tuple(prompt.id for prompt in seen))
    assert len(set(orders)) == 4 or size < 6


def test_no_prompt_is_left_out_for_ever() -> None:
    # Thirteen prompts in fours leave one out of each epoch: another one each time.
    counts = Counter(
        prompt.id
        for iteration in range(3 * 130)
        for prompt in prompts_of_iteration(prompts(13), 4, 0, iteration)
    )
    assert len(counts) == 13
    assert sum(counts.values()) == 4 * 390
    assert min(counts.values()) > 100


def test_prompts_depend_on_seed_and_iteration_alone() -> None:
    pool = prompts(64)
    first = [prompts_of_iteration(pool, 4, 1, iteration) for iteration in range(20)]
    second = [prompts_of_iteration(pool, 4, 1, iteration) for iteration in reversed(range(20))]
    assert first == second[::-1]
    assert first != [prompts_of_iteration(pool, 4, 2, iteration) for iteration in range(20)]
    # The order within an epoch is one permutation, cut differently by another count.
    fours = itertools.chain.from_iterable(first[:16])
    eights = (prompts_of_iteration(pool, 8, 1, iteration) for iteration in range(8))
    assert list(fours) == list(itertools.chain.from_iterable(eights))


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^training\.prompts_per_iteration|^rollout\.prompts_per_iteration"
    ):
        prompts_of_iteration(prompts(3), 4, 0, 0)
