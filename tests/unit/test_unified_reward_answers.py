"""Reading scores out of answers: many spellings of a score, and nothing that is not one."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2rpo.rewards.question import ASPECTS
from g2rpo.rewards.unified_reward.answers import (
    MalformedAnswerError,
    Scores,
    read_scores,
    well_formed,
)

TAUGHT = Scores(4.5, 3.0, 5.0)
PLAIN = "Alignment Score: 4.5\nCoherence Score: 3\nStyle Score: 5\n"


@pytest.mark.parametrize(
    "answer",
    [
        "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 5",
        PLAIN,
        "alignment: 4.5, COHERENCE: 3.0, Style: 5.",
        "Alignment: 4.5; coherence: 3; style: 5",
        "**Alignment Score (1-5):** 4.5\n\n**Coherence Score**: **3**\n* __Style Score__: _5_",
        "### Alignment Score\n:\n4.5\r\n### Coherence Score :\r\n3\r\n### Style Score =5",
        "Alignment Score (1 to 5): 4.5/5 Coherence Score (out of 5): 3 / 5 Style: 5 out of 5",
        '{"alignment_score": 4.5, "coherence_score": 3, "style_score": "5"}',
        "Style Score: 5 - pleasant\nCoherence Score: 3 (a hand is broken)\nAlignment Score: 4.50",
        '[["style", 0.3], ["Coherence:", 2], ["[No_mistakes]", 0.9]]\n\n' + PLAIN,
        "Style: 3D rendering, Coherence: 5 fingers are seen. Alignment: good.\n" + PLAIN,
        "Alignment Score: 4.5\nCoherence Score: 3\nStyle Score: 5\nAs said, style: 5.0",
        "Alignment Rating: 4.5\tCoherence Rating: 3\tStyle Rating: 5",
    ],
)
def test_spellings_of_the_same_scores(answer: str) -> None:
    assert read_scores(answer, 1, 5) == TAUGHT


GOOD = "Alignment Score: 4\nCoherence Score: 3\nStyle Score: 5\n"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no score for alignment and coherence and style"),
        ("A fine image. 4.5, 3, 5.", "no score for alignment"),
        ("Alignment Score: 4\nStyle Score: 5", "no score for coherence$"),
        ("Misalignment: 4\nnon-coherence: 3\nStylish: 5", "no score for alignment"),
        ("Alignment 4\nCoherence 3\nStyle 5", "no score for alignment"),
        ("Alignment Score: X\nCoherence Score: Y\nStyle Score: Z", "no score for alignment"),
        (GOOD.replace("4", "5.5"), "alignment 5.5 is outside 1 to 5"),
        (GOOD.replace("4", "0"), "alignment 0 is outside"),
        (GOOD.replace("4", "-4"), "alignment -4 is outside"),
        (GOOD.replace("4", "9" * 400), "alignment inf is outside"),
        (GOOD.replace("4", "NaN"), "score for alignment is not a plain number"),
        (GOOD.replace("4", "inf"), "not a plain number"),
        (GOOD.replace("4", "N/A"), "not a plain number"),
        (GOOD.replace("4", "4,5"), "not a plain number"),
        (GOOD.replace("4", "4-5"), "not a plain number"),
        (GOOD.replace("4", "4 - 5"), "not a plain number"),
        (GOOD.replace("4", "4.5.1"), "not a plain number"),
        (GOOD.replace("4", "4e0"), "not a plain number"),
        (GOOD.replace("4", ".5"), "not a plain number"),
        (GOOD.replace("4", "4 stars"), "not a plain number"),
        (GOOD.replace("4", "4/10"), "alignment is out of 10, not of 5"),
        (GOOD.replace("4", "4 out of 10"), "out of 10"),
        (GOOD.replace("4", "4 (out of 10)"), "out of 10"),
        (GOOD.replace("Alignment Score", "Alignment Score (1-10)"), r"uses the scale \(1-10\)"),
        (GOOD + "Alignment: 3", "alignment is both 4 and 3"),
        (GOOD + "Alignment Score: none", "not a plain number"),
    ],
)
def test_what_is_no_answer_is_refused(answer: str, reason: str) -> None:
    with pytest.raises(MalformedAnswerError, match=reason):
        read_scores(answer, 1, 5)
    assert not well_formed(answer, 1, 5)


def test_the_scale_is_the_templates() -> None:
    answer = "Alignment Score (0-10): 7/10\nCoherence Score: 0\nStyle Score: 9.5"
    assert read_scores(answer, 0, 10) == Scores(7.0, 0.0, 9.5)
    assert not well_formed(answer, 1, 5)


pieces = st.sampled_from(
    ["alignment", "Coherence", "style", " score", ":", "=", " ", "\n", "4", "5", ".", ",", "/",
     "-", "(", ")", "1-5", "nan", "*", "_"]
)  # fmt: skip


@given(st.lists(pieces, max_size=40).map("".join))
def test_pieces_of_answers_give_scores_in_range_or_nothing(text: str) -> None:
    if well_formed(text, 1, 5):
        found = read_scores(text, 1, 5)
        assert all(1 <= value <= 5 for value in found)
        assert all(aspect in text.lower() for aspect in ASPECTS)
        assert all(re.search(rf"(?<![0-9.]){value:g}(?![0-9])", text) for value in found)


def test_long_runs_of_marks_are_read_in_linear_time() -> None:
    assert not well_formed("alignment" + "*" * 200_000 + "style (" * 50_000, 1, 5)
