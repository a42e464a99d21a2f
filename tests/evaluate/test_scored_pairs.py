"""The annotators' ceiling in the data, members of an ensemble, and the page of a reward model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from accord.cli.evaluate import reward
from accord.errors import ConfigError
from accord.evaluate.report import RewardPage, write_reward_page
from accord.evaluate.reward import evaluate_ensemble, evaluate_rewards, overfit, repeated_judgements
from accord.models.load import load_reward_model
from accord.models.tiny import save_tiny
from accord.types import PreferencePair, Ranking


def test_the_ceiling_is_how_often_two_judgements_of_the_same_pair_agree() -> None:
    """a/b judged b, b, c... : prompt p has votes (x, x, y): 1 of 3 pairs of votes agree; q has (x, x): 1 of 1."""
    pairs = [
        PreferencePair("p", "x", "y"), PreferencePair("p", "x", "y"), PreferencePair("p", "y", "x"),
        PreferencePair("q", "x", "y"), PreferencePair("q", "x", "y"), PreferencePair("r", "x", "y"),
    ]  # fmt: skip
    found = repeated_judgements([*pairs, Ranking("s", ("x", "y"), (0, 1))])
    assert found is not None
    assert (found.value, found.pairs) == (0.5, 4)


def test_a_share_of_votes_is_a_ceiling_and_single_judgements_are_none() -> None:
    found = repeated_judgements([PreferencePair("p", "x", "y", probability=q) for q in (0.6,)]
                                + [PreferencePair("q", "x", "y", probability=1.0)])  # fmt: skip
    assert found is not None
    assert found.value == pytest.approx(0.8)
    assert repeated_judgements([PreferencePair("p", "x", "y"), PreferencePair("q", "x", "y")]) is None


def test_members_by_hand() -> None:
    """Margins (1, −1, 2) and (1, 1, 0.5): alike on the first and the third; half the differences 0, 1, .75."""
    found = evaluate_ensemble([[1, -1, 2], [1, 1, 0.5]])
    assert [row.value for row in found.members] == [pytest.approx(2 / 3), 1.0]
    assert found.unanimous == pytest.approx(2 / 3)
    assert found.spread == pytest.approx(1.75 / 3)


def test_the_page_shows_what_was_measured_and_its_json_the_same_numbers(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(0.4, 1, size=120)
    lengths = generator.integers(5, 90, size=(2, 120)).tolist()
    report = evaluate_rewards(
        margins.tolist(), [0.0] * 120, chosen_lengths=lengths[0], rejected_lengths=lengths[1],
        slices=["<b>code</b>" if index % 3 else "chat" for index in range(120)],
    )  # fmt: skip
    train = evaluate_rewards((margins + 3).tolist(), [0.0] * 120)
    page = RewardPage(
        "runs/rm", "held-out.jsonl", report, evaluate_ensemble([margins, margins]), overfit(train, report)
    )
    write_reward_page(tmp_path, page)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Orders {100 * report.accuracy.value:.1f}" in html
    assert "&lt;b&gt;code&lt;/b&gt;" in html
    assert "<b>code" not in html
    assert "Reliability diagram" in html
    for sign in page.overfit.signs if page.overfit else ():
        assert sign in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    read = json.loads((tmp_path / "reward.json").read_text(encoding="utf-8"))
    assert read["accuracy"]["value"] == report.accuracy.value
    assert read["overfit"]["gap"] == pytest.approx(train.accuracy.value - report.accuracy.value)
    assert sum(row["n"] for row in read["calibration"]["bins"]) == 120
    assert set(read["slices"]) == {"chat", "<b>code</b>"}


def test_the_command_measures_a_model_on_held_out_and_training_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = load_reward_model(str(save_tiny(tmp_path / "policy")))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        network.head.weight.normal_()
    network.save(tmp_path / "model")
    model = str(tmp_path / "model")
    rows = [
        {"prompt": f"Say {n}:", "chosen": f" {n}.", "rejected": f" {n + 1}!!", "topic": "even" if n % 2 == 0 else "odd"}
        for n in range(6)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    reward(model=model, data=str(data), out=tmp_path / "out", train=str(data), slice="topic")
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "reward.json").read_text(encoding="utf-8"))
    assert f"accuracy {found['accuracy']['value']:.3f}" in said
    assert "annotators agree 1.000" in said
    even, odd = (found["slices"][name]["value"] for name in ("even", "odd"))
    assert f"even: {even:.3f} (n = 4)" in said
    assert (4 * even + 3 * odd) / 7 == pytest.approx(found["accuracy"]["value"])
    assert found["ties"] == 0
    assert found["longer_wins"]["value"] == 0.0
    assert found["overfit"]["gap"] == 0.0
    assert (tmp_path / "out" / "report.html").exists()
    with pytest.raises(ConfigError, match="There is no column 'topics'"):
        reward(model=model, data=str(data), out=tmp_path / "other", slice="topics")
