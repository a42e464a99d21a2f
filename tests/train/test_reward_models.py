"""Reward models of several kinds: ratings by attribute, ensembles, frozen layers, dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from accord.engine.engine import Engine, EngineConfig
from accord.errors import ConfigError, EmptyDataError, ModelError
from accord.evaluate.scored import score_pairs
from accord.losses import LOSSES
from accord.models.attributes import Attribute, attributes_of
from accord.models.ensemble import RewardEnsemble
from accord.models.load import load_reward_model
from accord.models.network import RewardModel, RewardModelConfig
from accord.models.packing import pack
from accord.models.render import Renderer
from accord.models.trees import Branch, Tree
from accord.train import Run, TrainConfig, resolve, train, train_ensemble
from accord.train.ensemble import divide
from accord.types import PreferencePair, RatedCompletion

CPU = torch.device("cpu")
FACTS = {"data": "", "model": "", "template": ""}
RATED = [
    RatedCompletion(f"Say {word}:", f" {word * times}", {"brevity": float(4 - times), **extra})
    for word, times, extra in [
        ("red", 1, {"truth": 4.0}), ("red", 3, {"truth": 4.0}), ("blue", 2, {}), ("blue", 1, {"truth": 1.0}),
        ("grey", 3, {"truth": 0.0}), ("grey", 2, {"truth": 3.0}),
    ]
]  # fmt: skip
PAIRS = [PreferencePair(f"Say {n}:", f" {n}.", f" {n + 1}!") for n in range(12)]


def config(recipe: str, *assignments: str) -> TrainConfig:
    return resolve(recipe, assignments=["max_steps=6", 'engine.precision="float32"', *assignments])


def trained(network: RewardModel, trees: list[Tree], settings: TrainConfig, directory: Path) -> None:
    run = Run.open(directory, settings, FACTS, resume=False)
    (train_ensemble if settings.reward_model.members > 1 else train)(network, trees, settings, run, stage="Test")


def scores(network: RewardModel, trees: list[Tree]) -> list[float]:
    said = Engine(network, EngineConfig(precision="float32")).forward(trees)
    return [float(score[0]) for tree in said for score in tree]


def pair_tree(prompt: int, size: int = 3) -> Tree:
    tokens = [np.array([10 + k, 30 + prompt, 2]) for k in range(size)]
    return Tree(np.array([5, 6 + prompt]), tuple(Branch(t, np.ones(3, bool)) for t in tokens), ranks=tuple(range(size)))


def test_attributes_are_measured_in_the_data() -> None:
    """brevity 3, 1, 2, 3, 1, 2: mean 2, variance 4/6; truth 4, 4, 1, 0, 3: mean 2.4, variance 13.2/5."""
    brevity, truth = attributes_of(RATED, {})
    assert (brevity.name, brevity.mean, brevity.weight) == ("brevity", 2.0, 0.5)
    assert brevity.std == pytest.approx((4 / 6) ** 0.5)
    assert (truth.mean, truth.std) == pytest.approx((2.4, (13.2 / 5) ** 0.5))
    assert truth.restore(truth.standardise(3.7)) == pytest.approx(3.7)
    assert attributes_of(RATED, {"truth": -2.0}) == (Attribute("truth", truth.mean, truth.std, -2.0),)
    with pytest.raises(ConfigError, match="Did you mean 'truth'"):
        attributes_of(RATED, {"truthh": 1.0})
    with pytest.raises(ConfigError, match="All ratings of 'x' are 2"):
        attributes_of([RatedCompletion("a", "b", {"x": 2.0})] * 2, {})


def test_ratings_stand_in_the_models_order_and_gaps_stay_gaps(tiny_llama: Path) -> None:
    attributes = attributes_of(RATED, {"truth": 1.0, "brevity": 1.0})
    network = load_reward_model(str(tiny_llama), attributes=attributes, device=CPU)
    rows = [Renderer(network).tree(record).ratings for record in RATED]
    assert rows[2] == ((None, 0.0),)
    assert rows[0][0] == pytest.approx((1.6 / attributes[0].std, 1 / attributes[1].std))


def test_a_multi_attribute_model_learns_and_loads_with_its_scale(tmp_path: Path, tiny_llama: Path) -> None:
    settings = config("reward_ratings", "optimizer.learning_rate=3e-3", "max_steps=30", "epochs=30")
    attributes = attributes_of(RATED, {"brevity": 1.0, "truth": -0.5})
    network = load_reward_model(str(tiny_llama), settings.reward_model, attributes=attributes, device=CPU)
    trees = [Renderer(network).tree(record) for record in RATED]
    bound = LOSSES["regression"].bind({})
    engine = Engine(network, EngineConfig(precision="float32"))
    targets = [z for tree in trees for z in tree.ratings[0] if z is not None]
    before = engine.evaluate(trees, bound)["loss"]
    assert before == pytest.approx(float(np.mean(np.square(targets)))), "a head of zeros predicts every mean"
    assert before == pytest.approx(1.0)
    trained(network, trees, settings, tmp_path)
    assert engine.evaluate(trees, bound)["loss"] < 0.5

    again = load_reward_model(str(tmp_path / "model"), device=CPU)
    assert again.attributes == network.attributes == attributes
    assert scores(again, trees) == pytest.approx(scores(network, trees), abs=1e-5)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert plain.config.id2label == {0: "brevity", 1: "truth"}
    row = torch.from_numpy(np.concatenate([trees[0].prompt_P, trees[0].branches[0].tokens_L]))[None]
    with torch.no_grad():
        z = plain(row).logits[0].tolist()
    assert scores(again, trees)[0] == pytest.approx(z[0] - 0.5 * z[1], abs=1e-4), "the score is the weighted sum"
    with pytest.raises(ModelError, match="predicts brevity, truth"):
        load_reward_model(str(tmp_path / "model"), attributes=attributes[:1], device=CPU)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_missing_ratings_have_no_gradient(tiny_llama: Path, passes: Any) -> None:
    attributes = attributes_of(RATED, {})
    network = load_reward_model(str(tiny_llama), attributes=attributes, device=CPU)
    trees = [Renderer(network).tree(record) for record in RATED[2:3]]
    network.model.zero_grad()
    Engine(network, EngineConfig(precision="float32")).forward_backward(trees, LOSSES["regression"].bind({}), passes)
    gradient = network.model.score.weight.grad
    assert not gradient[1].any(), "truth was not rated"
    other = [Renderer(network).tree(record) for record in RATED[1:2]]
    Engine(network, EngineConfig(precision="float32")).forward_backward(other, LOSSES["regression"].bind({}), passes)
    assert network.model.score.weight.grad[1].any()


def test_parts_of_an_ensemble_are_disjoint_and_even() -> None:
    trees = [pair_tree(prompt % 9) for prompt in range(30)]
    parts = divide(trees, 2, seed=0)
    prompts = [{tree.prompt_P.tobytes() for tree in part} for part in parts]
    assert prompts[0].isdisjoint(prompts[1])
    assert sorted(map(len, prompts)) == [4, 5]
    assert sum(map(len, parts)) == 30
    assert {t.prompt_P.tobytes() for t in divide(trees[::-1], 2, seed=0)[0]} == prompts[0]
    with pytest.raises(EmptyDataError, match="9 prompts cannot be divided among 10"):
        divide(trees, 10, seed=0)


def test_an_ensemble_trains_its_members_apart_and_loads_as_one(tmp_path: Path, tiny_llama: Path) -> None:
    settings = config("reward", "reward_model.members=2", "reward_model.penalty=0.5", "optimizer.learning_rate=1e-3")
    trees = [pair_tree(prompt) for prompt in range(8)]
    start = load_reward_model(str(tiny_llama), settings.reward_model, device=CPU)
    trained(start, trees, settings, tmp_path / "both")
    alone = config("reward", "optimizer.learning_rate=1e-3")
    members = []
    for number, part in enumerate(divide(trees, 2, settings.seed)):
        member = load_reward_model(str(tiny_llama), device=CPU)
        trained(member, part, alone, tmp_path / f"alone-{number}")
        members.append(scores(member, trees))
    network = load_reward_model(str(tmp_path / "both" / "model"), device=CPU)
    assert isinstance(network, RewardEnsemble)
    for member, expected in zip(network.members, members, strict=True):
        assert scores(member, trees) == pytest.approx(expected, abs=1e-6)
    mean, spread = np.mean(members, axis=0), np.std(members, axis=0)
    assert spread.max() > 1e-4
    assert scores(network, trees) == pytest.approx(list(mean - 0.5 * spread), abs=1e-6)
    with pytest.raises(ModelError, match="not trained further"):
        load_reward_model(str(tmp_path / "both" / "model"), RewardModelConfig())


def test_an_ensemble_goes_on_with_the_member_that_it_was_at(tmp_path: Path, tiny_llama: Path) -> None:
    settings = config("reward", "reward_model.members=2")
    trees = [pair_tree(prompt) for prompt in range(8)]
    run = Run.open(tmp_path, settings, FACTS, resume=False)
    network = load_reward_model(str(tiny_llama), settings.reward_model, device=CPU)
    (tmp_path / "members").mkdir()
    (tmp_path / "members" / "2").write_text("in the way")
    with pytest.raises(Exception, match=r"members/2"):
        train_ensemble(network, trees, settings, run, stage="Test")
    finished = (tmp_path / "members" / "1" / "model" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "members" / "2").unlink()
    train_ensemble(network, trees, settings, run, stage="Test")
    assert (tmp_path / "model" / "1" / "model.safetensors").exists()
    assert json.loads((tmp_path / "model" / "ensemble.json").read_text())["members"] == ["1", "2"]
    metrics = (tmp_path / "members" / "1" / "metrics.jsonl").stat().st_mtime_ns
    assert metrics <= finished, "the first member was not trained twice"


def test_scored_pairs_of_an_ensemble_say_how_far_the_members_agree(tmp_path: Path, tiny_llama: Path) -> None:
    settings = config("reward", "reward_model.members=2", "optimizer.learning_rate=1e-3")
    network = load_reward_model(str(tiny_llama), settings.reward_model, device=CPU)
    trees = [Renderer(network).tree(pair) for pair in PAIRS]
    trained(network, trees, settings, tmp_path)
    scored = score_pairs(load_reward_model(str(tmp_path / "model"), device=CPU), PAIRS, "Test")
    found = scored.ensemble()
    assert found is not None
    assert scored.members is not None
    margins = scored.members[:, ::2] - scored.members[:, 1::2]
    assert found.unanimous == pytest.approx(float((np.sign(margins[0]) == np.sign(margins[1])).mean()))
    assert found.spread == pytest.approx(float(np.abs(margins[0] - margins[1]).mean() / 2))
    assert [row.n for row in found.members] == [12, 12]
    assert scored.report().margin == pytest.approx(float(margins.mean()), abs=1e-6)


@pytest.mark.parametrize(("layers", "trained_layers"), [(0, {0, 1, 2}), (2, {2}), ("all", set())])
def test_frozen_layers_have_no_gradient_and_do_not_change(
    tiny_llama: Path, layers: Any, trained_layers: set[int]
) -> None:
    network = load_reward_model(str(tiny_llama), RewardModelConfig(frozen_layers=layers), device=CPU)
    torch.nn.init.constant_(network.model.score.weight, 0.1)
    engine = Engine(network, EngineConfig(precision="float32"))
    engine.forward_backward([pair_tree(0), pair_tree(1)], LOSSES["bradley_terry"].bind({}))
    moved = {name for name, parameter in network.model.named_parameters() if parameter.grad is not None}
    assert {int(name.split(".")[2]) for name in moved if ".layers." in name} == trained_layers
    assert ("model.embed_tokens.weight" in moved) == (layers == 0)
    assert "score.weight" in moved


def test_more_frozen_layers_than_there_are_is_an_error(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="The model has 3 layers"):
        load_reward_model(str(tiny_llama), RewardModelConfig(frozen_layers=4), device=CPU)


def test_dropout_depends_on_the_step_and_the_place_and_not_on_packing_or_passes(tiny_llama: Path) -> None:
    trees = [pair_tree(prompt) for prompt in range(4)]

    def gradient(seed: int, tokens: int, passes: Any, share: float = 0.5) -> torch.Tensor:
        network = load_reward_model(str(tiny_llama), RewardModelConfig(dropout=share), device=CPU)
        engine = Engine(network, EngineConfig(precision="float32", micro_batch_tokens=tokens))
        network.model.train()
        torch.manual_seed(seed)
        engine.forward_backward(trees, LOSSES["bradley_terry"].bind({}), passes)
        found: torch.Tensor = network.model.score.weight.grad
        return found

    one = gradient(1, 4096, "one")
    torch.testing.assert_close(gradient(1, 16, "auto"), one)
    torch.testing.assert_close(gradient(1, 4096, "two"), one)
    assert not torch.allclose(gradient(2, 4096, "one"), one)
    assert not torch.allclose(gradient(1, 4096, "one", share=0.0), one)


@torch.no_grad()
def test_dropout_keeps_the_mean_and_rests_in_evaluation(tiny_llama: Path) -> None:
    network = load_reward_model(str(tiny_llama), RewardModelConfig(dropout=0.3), device=CPU)
    torch.nn.init.constant_(network.model.score.weight, 0.1)
    tree = pair_tree(0, size=2)
    (batch,) = pack([tree], 1024)
    network.model.train()
    drawn = []
    for seed in range(300):
        torch.manual_seed(seed)
        drawn.append(network(batch).tensors()["scores"].tolist())
    quiet = scores(network, [tree])
    error = np.std(drawn, axis=0) / np.sqrt(300)
    assert (np.abs(np.mean(drawn, axis=0) - quiet) < 4 * error).all()
    assert (error > 0).all()


@pytest.mark.parametrize(
    ("recipe", "assignment", "message"),
    [
        ("dpo", 'reward_model.pooling="mean"', "trains no reward model"),
        ("reward", "reward_model.attributes.truth=1.0", "learns from no ratings"),
        ("reward", "reward_model.penalty=1.0", "does not disagree with itself"),
        ("reward", "lora.rank=4 reward_model.frozen_layers=1", "With LoRA every layer is frozen"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(recipe: str, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(recipe, assignments=assignment.split())
