"""Families of comparisons: who is compared, what is corrected together, and what is said of it."""

import numpy as np
import pytest
import scipy.stats

from benchmarks.evaluation.statistics import (
    ALPHA,
    Comparison,
    CorrectedComparison,
    Interval,
    Label,
    Resampling,
    checkpoint_comparisons,
    checkpoint_improvements,
    compare_pairs,
    compare_with_baseline,
    comparison_sentence,
    holm,
    improvement_sentence,
    method_comparisons,
    method_improvements,
)

RNG = np.random.default_rng(40)
REWARDS = ("HPS", "CLIP")
BASE = RNG.normal(0.3, 0.1, size=(2, 1, 60))
SCORES = {
    "base": BASE,
    "G2RPO": BASE + 0.02 + RNG.normal(0, 0.03, size=(2, 3, 60)),
    "DanceGRPO": BASE + RNG.normal(0, 0.03, size=(2, 3, 60)),
    "MixGRPO": BASE - 0.02 + RNG.normal(0, 0.03, size=(2, 3, 60)),
}
FAST = Resampling(resamples=500)


def ends(found: Interval | Comparison) -> tuple[float, float, float]:
    mean = found.mean if isinstance(found, Interval) else found.difference
    return mean, found.low, found.high


def test_every_method_meets_the_baseline_under_every_reward() -> None:
    found = compare_with_baseline(SCORES, "base", REWARDS, label="checkpoint", resampling=FAST)
    assert [(f.first, f.second, f.reward) for f in found] == [
        (name, "base", reward) for name in ("G2RPO", "DanceGRPO", "MixGRPO") for reward in REWARDS
    ]
    assert {f.family for f in found} == {6}
    assert [f.adjusted for f in found] == holm([f.comparison.p_value for f in found]).tolist()
    assert {f.comparison.label for f in found} == {"checkpoint"}
    assert [f.significant for f in found] == [f.adjusted < ALPHA for f in found]


def test_checkpoint_family_is_made_of_its_single_comparisons() -> None:
    settings = Resampling(level=0.9, resamples=500, seed=3, kind="bca")
    found = compare_with_baseline(SCORES, "base", REWARDS, label="checkpoint", resampling=settings)
    for name, members in (("G2RPO", found[:2]), ("MixGRPO", found[4:])):
        keywords = {"level": 0.9, "resamples": 500, "seed": 3}
        alone = checkpoint_comparisons(
            SCORES[name].mean(axis=1), BASE[:, 0], kind="bca", **keywords
        )
        shares = checkpoint_improvements(SCORES[name], BASE, kind="bca", **keywords)
        for member, one, share in zip(members, alone, shares, strict=True):
            got = member.comparison
            assert (*ends(got), got.p_value) == pytest.approx((*ends(one), one.p_value))
            assert (got.label, got.count, got.level) == ("checkpoint", 60, 0.9)
            assert member.improvement is not None
            assert ends(member.improvement) == pytest.approx(ends(share))


def test_method_family_is_the_paired_t_test_over_seeds() -> None:
    found = compare_pairs(
        SCORES, [("G2RPO", "DanceGRPO"), ("G2RPO", "MixGRPO")], REWARDS, label="method"
    )
    place = 0
    for other in ("DanceGRPO", "MixGRPO"):
        one, two = SCORES["G2RPO"].mean(axis=2), SCORES[other].mean(axis=2)
        for row, reward in enumerate(REWARDS):
            member = found[place]
            expected = scipy.stats.ttest_rel(one[row], two[row])
            assert (member.second, member.reward) == (other, reward)
            assert member.comparison.p_value == pytest.approx(expected.pvalue)
            assert (member.comparison.label, member.comparison.count) == ("method", 3)
            assert member.improvement is not None
            assert member.improvement.label == "method"
            place += 1
    assert [f.adjusted for f in found] == holm([f.comparison.p_value for f in found]).tolist()


def test_a_baseline_without_seeds_is_a_constant() -> None:
    found = compare_with_baseline(SCORES, "base", REWARDS, label="method")
    means = SCORES["G2RPO"].mean(axis=2)
    repeated = np.broadcast_to(BASE.mean(axis=2), means.shape)
    alone = method_comparisons(means, repeated)
    shares = method_improvements(SCORES["G2RPO"], BASE)
    for member, one, share in zip(found[:2], alone, shares, strict=True):
        assert ends(member.comparison) == pytest.approx(ends(one))
        assert member.comparison.p_value == pytest.approx(one.p_value)
        assert member.improvement is not None
        assert ends(member.improvement) == pytest.approx(ends(share))


def test_the_order_of_a_pair_only_turns_the_sign() -> None:
    (one,) = compare_pairs(
        {name: cube[:1] for name, cube in SCORES.items()},
        [("G2RPO", "MixGRPO")],
        ["HPS"],
        label="checkpoint",
        resampling=FAST,
    )
    (two,) = compare_pairs(
        {name: cube[:1] for name, cube in SCORES.items()},
        [("MixGRPO", "G2RPO")],
        ["HPS"],
        label="checkpoint",
        resampling=FAST,
    )
    assert one.comparison.difference == pytest.approx(-two.comparison.difference)
    assert (one.comparison.low, one.adjusted) == pytest.approx((-two.comparison.high, two.adjusted))
    assert one.improvement is not None and two.improvement is not None
    assert one.improvement.mean == pytest.approx(1 - two.improvement.mean)
    # One comparison needs no correction.
    assert (one.family, one.adjusted) == (1, one.comparison.p_value)


@pytest.mark.parametrize("label", ["checkpoint", "method"])
def test_the_same_scores_twice_are_not_told_apart(label: Label) -> None:
    scores = {"one": SCORES["G2RPO"], "other": SCORES["G2RPO"].copy()}
    for member in compare_with_baseline(scores, "other", REWARDS, label=label, resampling=FAST):
        assert (member.comparison.difference, member.adjusted) == (0, 1)
        assert member.improvement is not None
        assert member.improvement.mean == 0.5


def test_two_prompts_are_the_fewest() -> None:
    scores = {"one": [[[1.0, 2.0]]], "base": [[[0.0, 0.5]]]}
    (found,) = compare_with_baseline(scores, "base", ["HPS"], label="checkpoint", resampling=FAST)
    # Differences 1 and 1.5; of four assignments of signs, two are as extreme.
    assert (found.comparison.difference, found.adjusted) == (1.25, 0.5)
    assert (found.comparison.low, found.comparison.high) == (1.0, 1.5)


def test_nothing_to_compare_is_an_empty_family() -> None:
    assert compare_with_baseline({"base": BASE}, "base", REWARDS, label="method") == []
    assert compare_pairs(SCORES, [], REWARDS, label="method") == []


def test_what_does_not_fit_is_refused() -> None:
    def refuse(match: str, scores: dict[str, np.ndarray], label: str = "checkpoint") -> None:
        with pytest.raises(ValueError, match=match):
            compare_with_baseline(scores, "base", REWARDS, label=label)  # type: ignore[arg-type]

    full = SCORES["G2RPO"]
    holed = full.copy()
    holed[0, 1, 2] = np.nan
    refuse("no scores of the baseline", {"one": full})
    refuse("not finite", {"one": holed, "base": BASE})
    refuse("for 2 rewards", {"one": full[:1], "base": BASE})
    refuse("not paired", {"one": full[:, :, 1:], "base": BASE})
    refuse("not paired", {"one": full[:, :2], "base": full})
    refuse("the pairs differ", {"one": full[:, :2], "two": full, "base": BASE})
    refuse("at least 3 seeds", {"one": full[:, :2], "base": BASE}, "method")
    refuse("checkpoint or method", {"one": full, "base": BASE}, "seeds")
    for pairs in (
        [("G2RPO", "G2RPO")],
        [("G2RPO", "base"), ("G2RPO", "base")],
        [("G2RPO", "base"), ("base", "G2RPO")],
    ):
        with pytest.raises(ValueError, match="no pair, or are compared twice"):
            compare_pairs(SCORES, pairs, REWARDS, label="method")
    with pytest.raises(ValueError, match="no scores of 'other'"):
        compare_pairs(SCORES, [("G2RPO", "other")], REWARDS, label="method")


def member(
    comparison: Comparison, adjusted: float, family: int = 12, improvement: Interval | None = None
) -> CorrectedComparison:
    return CorrectedComparison(
        "G2RPO", "the base", "HPS", comparison, adjusted, family, improvement
    )


def test_a_significant_difference_has_its_direction() -> None:
    higher = Comparison(0.0058, 0.0041, 0.0075, 1e-5, "checkpoint", 400)
    assert comparison_sentence(member(higher, 1.2e-4)) == (
        "G2RPO scores 0.0058 higher than the base on HPS (95 % interval 0.0041 to 0.0075 over 400 "
        "prompts of these checkpoints; p < 0.001 after Holm's correction over 12 comparisons)."
    )
    lower = Comparison(-0.25, -0.375, -0.125, 0.004, "method", 3, level=0.9)
    assert comparison_sentence(member(lower, 0.02, family=5), digits=3) == (
        "G2RPO scores 0.250 lower than the base on HPS (90 % interval 0.125 to 0.375 over 3 "
        "training seeds; p = 0.020 after Holm's correction over 5 comparisons)."
    )


def test_a_difference_that_is_not_significant_is_left_open() -> None:
    unclear = Comparison(-0.0012, -0.0034, 0.0011, 0.31, "method", 5)
    assert comparison_sentence(member(unclear, 1.0)) == (
        "Whether G2RPO scores higher or lower than the base on HPS is not settled: the difference "
        "measured is -0.0012 (95 % interval -0.0034 to 0.0011 over 5 training seeds; p = 1.000 "
        "after Holm's correction over 12 comparisons)."
    )
    lost = Comparison(0.0012, 0.0001, 0.0023, 0.03, "checkpoint", 400)
    text = comparison_sentence(member(lost, 0.36))
    assert "not settled" in text
    assert "p = 0.360 after Holm's correction over 12 comparisons, p = 0.030 before it" in text


@pytest.mark.parametrize("p_value", [0.051, 0.3, 1.0])
@pytest.mark.parametrize("difference", [-0.4, -1e-9, 0.0, 1e-9, 0.4])
def test_no_sentence_claims_that_nothing_differs(p_value: float, difference: float) -> None:
    comparison = Comparison(difference, difference - 1, difference + 1, p_value, "method", 3)
    text = comparison_sentence(member(comparison, p_value)).lower()
    for claim in ("equal", "no difference", "the same", "as well as", "-0.0000"):
        assert claim not in text
    assert "not settled" in text


def test_numbers_are_not_rounded_into_another_claim() -> None:
    tiny = Comparison(0.00002, 0.00001, 0.00003, 0.0499, "checkpoint", 400)
    text = comparison_sentence(member(tiny, 0.0499, family=1))
    assert "scores 2e-05 higher" in text
    assert "(95 % interval 1e-05 to 3e-05 over" in text
    # Just significant, though three decimals would show 0.050; and alone, so without correction.
    assert text.endswith("p < 0.05).")
    none = Comparison(-0.0, -0.0, 0.0, 1.0, "checkpoint", 400)
    assert "is 0.0000 (95 % interval 0.0000 to 0.0000" in comparison_sentence(member(none, 1.0))


def test_improvement_sentence() -> None:
    comparison = Comparison(0.0058, 0.0041, 0.0075, 1e-5, "checkpoint", 400)
    share = Interval(0.615, 0.567, 0.6625, "checkpoint", 400)
    assert improvement_sentence(member(comparison, 1e-4, improvement=share)) == (
        "On a prompt, G2RPO scores higher than the base on HPS with probability 0.615 (95 % "
        "interval 0.567 to 0.662 over 400 prompts of these checkpoints; ties count half)."
    )
    with pytest.raises(ValueError, match="no probability of improvement"):
        improvement_sentence(member(comparison, 1e-4))
