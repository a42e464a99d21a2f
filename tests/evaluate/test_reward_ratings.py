"""A reward model of ratings against the ratings: errors, rank correlation, and what the command says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from accord.cli import run
from accord.errors import DataError, ModelError
from accord.evaluate.report import RatingsPage, write_reward_page
from accord.evaluate.reward_ratings import evaluate_attribute
from accord.evaluate.scored import rate
from accord.models.attributes import attributes_of
from accord.models.load import load_reward_model
from accord.models.network import RewardModel
from accord.models.packing import pack
from accord.models.render import Renderer
from accord.models.tiny import save_tiny
from accord.types import RatedCompletion

CPU = torch.device("cpu")
RATED = [
    RatedCompletion(f"Say {n}:", f" {n}" * (n % 4 + 1), {"brevity": 4.0 - n % 4, **({"truth": n / 2} if n % 3 else {})})
    for n in range(9)
]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    """A model of brevity and truth whose head is random."""
    path = save_tiny(tmp_path_factory.mktemp("model") / "tiny")
    made = load_reward_model(str(path), attributes=attributes_of(RATED, {"brevity": 1.0, "truth": 2.0}), device=CPU)
    torch.manual_seed(0)
    torch.nn.init.normal_(made.model.score.weight, std=0.3)
    return made


def test_by_hand() -> None:
    """Errors 1, 0, −2: √(5/3). Of the mean 1: 1, 1, 3: √(11/3). Ranks 1, 2, 3 against 1, 3, 2: ρ = 1 − 6·2/24 = ½."""
    report = evaluate_attribute("truth", [1.0, 2.0, 2.5], [0.0, 2.5, 2.0], mean=1.0)
    assert report.rmse == pytest.approx(((1 + 0.25 + 0.25) / 3) ** 0.5)
    assert report.mean_rmse == pytest.approx(((1 + 2.25 + 1) / 3) ** 0.5)
    assert report.spearman == pytest.approx(0.5)
    assert report.interval is None, "three ratings have no interval"


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of normal pairs with correlation ½, Spearman's is 6/π·asin(¼) = 0.483: 95 % of 400 intervals of 60 pairs."""
    rng = np.random.default_rng(0)
    truth, hits = 6 / np.pi * np.arcsin(0.25), 0
    for _ in range(400):
        x, noise = rng.normal(size=(2, 60))
        interval = evaluate_attribute("a", x.tolist(), (0.5 * x + 0.75**0.5 * noise).tolist(), 0.0).interval
        assert interval is not None
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / 400 <= 0.98


def test_constant_and_perfect_orders() -> None:
    constant = evaluate_attribute("a", [2.0] * 5, [1, 2, 3, 4, 5], mean=2.0)
    assert (constant.spearman, constant.interval) == (None, None)
    assert constant.rmse == constant.mean_rmse
    perfect = evaluate_attribute("a", [10, 20, 30, 40], [1, 2, 3, 9], mean=2.0)
    assert perfect.spearman == pytest.approx(1.0)
    assert perfect.interval == pytest.approx((1.0, 1.0))
    for predicted, given in [([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0])]:
        with pytest.raises(DataError, match="a: Predictions must be finite"):
            evaluate_attribute("a", predicted, given, 0.0)


def test_predictions_are_the_heads_outputs_in_the_units_of_the_data(network: RewardModel) -> None:
    reports, unrated = rate(network, RATED, "Test")
    assert unrated == []
    assert [(row.name, row.n) for row in reports] == [("brevity", 9), ("truth", 6)]
    trees = [Renderer(network).tree(record) for record in RATED]
    with torch.no_grad():
        z = torch.cat(
            [network(pack([tree], 1 << 20)[0], frozenset({"ratings"})).statistics["ratings"] for tree in trees]
        )
    for column, (report, attribute) in enumerate(zip(reports, network.attributes, strict=True)):
        rows = [row for row, record in enumerate(RATED) if attribute.name in record.ratings]
        given = np.array([RATED[row].ratings[attribute.name] for row in rows])
        predicted = attribute.mean + attribute.std * z[rows, column].numpy()
        assert report.rmse == pytest.approx(np.sqrt(np.mean((predicted - given) ** 2)), rel=1e-2), "low precision"
        assert report.mean_rmse == pytest.approx(attribute.std), "in the training data that is the deviation"
        assert report.spearman == pytest.approx(spearmanr(predicted, given).statistic, abs=0.06)


def test_what_cannot_be_compared_is_said(network: RewardModel, tmp_path: Path) -> None:
    _, unrated = rate(network, [RATED[0], RATED[3]], "Test")
    assert unrated == ["truth"]
    with pytest.raises(DataError, match="rates none of brevity, truth"):
        rate(network, [RatedCompletion("a", " b", {"style": 1.0})], "Test")
    plain = load_reward_model(str(save_tiny(tmp_path / "plain")), device=CPU)
    with pytest.raises(ModelError, match=r"one score, and no ratings(.|\n)*reward_ratings"):
        rate(plain, RATED, "Test")


def test_the_command_writes_a_page(network: RewardModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network.save(tmp_path / "model")
    data = tmp_path / "rated.jsonl"
    rows = [{"prompt": each.prompt, "completion": each.completion, "ratings": each.ratings} for each in RATED]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "reward", "--model", str(tmp_path / "model"), "--data", str(data), "--kind", "ratings"]
    assert run([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "reward.json").read_text())
    assert [row["name"] for row in found["attributes"]] == ["brevity", "truth"]
    for row in found["attributes"]:
        assert f"{row['name']}: error {row['rmse']:.3f}, of the mean {row['mean_rmse']:.3f}; Spearman" in said
    assert "Nearer than the mean on" in (tmp_path / "out" / "report.html").read_text()
    assert run([*words, "--out", str(tmp_path / "none"), "--slice", "topic"]) == 1
    assert "--slice: It has no effect on ratings." in capsys.readouterr().err


def test_names_of_attributes_stay_text(tmp_path: Path) -> None:
    row = evaluate_attribute("<b>truth</b>", [1.0, 2.0], [2.0, 1.0], 0.0)
    write_reward_page(tmp_path, RatingsPage("rm", "rated.jsonl", [row], ["<i>"]))
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;truth" in page
    assert "<b>truth" not in page
    assert "<i>" not in page
    assert "−1.00" in page
