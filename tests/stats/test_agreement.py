"""Agreement against scikit-learn, the krippendorff package, hand counts, and simulated coverage."""

import itertools

import krippendorff
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from accord.errors import ConfigError
from accord.stats import cohen_kappa, krippendorff_alpha, pairwise_agreement

panels = st.integers(2, 4).flatmap(
    lambda raters: st.integers(2, 12).flatmap(
        lambda items: st.lists(
            st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=items, max_size=items),
            min_size=raters,
            max_size=raters,
        )
    )
)


@given(panels, st.sampled_from(["nominal", "ordinal", "interval"]))
def test_alpha_equals_the_krippendorff_package(ratings, level):
    paired = [column for column in zip(*ratings, strict=True) if sum(x is not None for x in column) > 1]
    values = {value for column in paired for value in column if value is not None}
    assume(len(values) > 1)
    data = np.array([[np.nan if x is None else x for x in row] for row in ratings], dtype=float)
    expected = krippendorff.alpha(data, level_of_measurement=level)
    assert krippendorff_alpha(ratings, level, resamples=20).value == pytest.approx(expected, abs=1e-9)


def test_alpha_is_undefined_not_a_crash():
    same = krippendorff_alpha([["a", "a", None], ["a", "a", "a"]])
    assert (same.value, same.interval, same.observed, same.pairs) == (None, None, 1.0, 2)
    assert "same" in same.reason
    lonely = krippendorff_alpha([[1, None], [None, 2]], "ordinal")
    assert (lonely.value, lonely.observed, lonely.pairs) == (None, None, 0)
    assert "two annotators" in lonely.reason
    assert krippendorff_alpha([[None], [None]]).value is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=30))
def test_kappa_equals_scikit_learn(labels):
    first, second = zip(*labels, strict=True)
    assume(len({*first, *second}) > 1)
    expected = cohen_kappa_score(first, second)
    assert cohen_kappa(first, second, resamples=20).value == pytest.approx(expected, abs=1e-12)


def test_kappa_skips_missing_labels_and_says_when_it_is_undefined():
    """Three items have both labels: observed 2/3, expected (2·1 + 1·2)/9 = 4/9, κ = 2/5."""
    result = cohen_kappa(["x", "x", "y", None, "y"], ["x", "y", "y", "x", None])
    assert result.value == pytest.approx(0.4)
    assert result.pairs == 3
    assert cohen_kappa(["x", "x"], ["x", "x"]).value is None


@given(panels)
def test_pairwise_agreement_is_a_count(ratings):
    pairs = [
        (one, two)
        for column in zip(*ratings, strict=True)
        for one, two in itertools.combinations(column, 2)
        if one is not None and two is not None
    ]
    assume(pairs)
    result = pairwise_agreement(ratings, resamples=20)
    assert result.pairs == len(pairs)
    assert result.value == pytest.approx(sum(one == two for one, two in pairs) / len(pairs))
    assert result.value == result.observed


@pytest.mark.parametrize("measure", [pairwise_agreement, krippendorff_alpha])
def test_relabelling_and_reordering_annotators_change_nothing(measure):
    ratings = [["a", "b", "a", None], ["a", "b", "b", "c"], ["b", "b", "a", "c"]]
    renamed = [[{"a": "x", "b": "y", "c": "z"}.get(value) for value in row] for row in reversed(ratings)]
    first, second = measure(ratings), measure(renamed)
    assert first.value == pytest.approx(second.value)
    assert first.interval == pytest.approx(second.interval)


def test_the_interval_resamples_prompts_not_items():
    """Ten copies of each item under one prompt carry no more information than the item alone."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, 60)
    ratings = [[int(x) if generator.random() < 0.8 else int(1 - x) for x in truth] for _ in range(2)]
    copies = [[value for value in row for _ in range(10)] for row in ratings]
    clusters = [item for item in range(60) for _ in range(10)]
    alone = pairwise_agreement(ratings)
    clustered = pairwise_agreement(copies, clusters=clusters)
    naive = pairwise_agreement(copies)
    assert clustered.interval == pytest.approx(alone.interval)
    assert naive.interval.high - naive.interval.low < 0.5 * (alone.interval.high - alone.interval.low)


def test_the_interval_covers_alpha():
    """Two annotators, each right with 0.85 on a fair coin: they agree on 0.745, so α is 2·0.745 - 1 = 0.49."""
    generator = np.random.default_rng(3)
    inside = 0
    for trial in range(200):
        truth = generator.integers(0, 2, 80)
        noisy = [np.where(generator.random(80) < 0.85, truth, 1 - truth).tolist() for _ in range(2)]
        low, high = krippendorff_alpha(noisy, resamples=300, seed=trial).interval
        inside += low <= 0.49 <= high
    assert 0.89 <= inside / 200 <= 0.99


def test_one_prompt_has_no_interval():
    assert pairwise_agreement([[1, 2], [1, 1]], clusters=["p", "p"]).interval is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: krippendorff_alpha([[1, 2], [1]]),
        lambda: krippendorff_alpha([]),
        lambda: krippendorff_alpha([["a"], ["b"]], "ordinal"),
        lambda: krippendorff_alpha([[1], [2]], "ratio"),
        lambda: krippendorff_alpha([[1.0, float("nan")], [1.0, 2.0]], "interval"),
        lambda: pairwise_agreement([[1, 2], [1, 2]], clusters=["p"]),
    ],
)
def test_wrong_ratings_are_refused(call):
    with pytest.raises(ConfigError):
        call()
