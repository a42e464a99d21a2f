"""How well `starter` learns human preferences as a reward model.

    python benchmarks/reward_accuracy.py --set epochs=2 --set optimizer.learning_rate=1e-5

Trains it on the 1,595 training pairs of `hh_harmless` with the recipe `reward`, then orders the 304 test pairs, whose
prompts are not in the training part. Beside it: "longer wins", and a logistic regression on the difference of the word
counts of the two completions (C = 0.01, the best of 0.01 … 1 by 5-fold cross-validation on the training pairs).
Choose settings on the training pairs (--validate holds out every fifth of them and leaves the test pairs alone).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import vstack

from accord.data.load import load
from accord.engine.engine import Engine
from accord.evaluate.reward import Accuracy, RewardReport, evaluate_rewards
from accord.models.load import load_reward_model
from accord.models.network import Network
from accord.models.render import Renderer
from accord.models.starter import STARTER
from accord.models.trees import Tree
from accord.tracking import Progress
from accord.train import Run, TrainConfig, provenance, resolve, train
from accord.types import PreferencePair

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "hh_harmless"
_CHUNK = 16


def main() -> None:
    options = _options()
    if not DATA.is_dir():
        raise SystemExit(f"This benchmark needs {os.path.relpath(DATA)} (HH-RLHF, harmless-base), which is not there.")
    config = resolve("reward", assignments=options.set)
    train_pairs, test_pairs = _pairs("train"), _pairs("test")
    if options.validate:
        test_pairs = train_pairs[::5]
        train_pairs = [pair for index, pair in enumerate(train_pairs) if index % 5]
    with tempfile.TemporaryDirectory() as directory:
        network = _train(train_pairs, config, options.out or Path(directory) / "run")
        ours = _score(network, test_pairs, config)
    words = _bag_of_words(train_pairs, test_pairs)
    assert ours.longer_wins is not None
    table = {"reward model": ours.accuracy, "bag of words": words.accuracy, "longer wins": ours.longer_wins}
    print(f"\n{len(train_pairs):,} pairs to train on, {len(test_pairs):,} to test on; 95 % Wilson intervals")
    for name, accuracy in table.items():
        low, high = accuracy.interval
        print(f"{name:14}accuracy {accuracy.value:.3f} ({low:.3f}-{high:.3f})")
    print(f"{'reward model':14}log-loss {ours.log_loss:.3f} (always one half: 0.693), confidence {ours.confidence:.3f}")
    print(
        json.dumps(
            {"settings": list(options.set), "validation": options.validate, **_answer(table), "log_loss": ours.log_loss}
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument("--validate", action="store_true", help="test on a fifth of the training pairs instead")
    parser.add_argument("--out", type=Path, help="keep the run here (default: nothing is kept)")
    return parser.parse_args()


def _pairs(part: str) -> list[PreferencePair]:
    records = load(str(DATA / f"{part}.jsonl.gz"), "preferences").records
    return [record for record in records if isinstance(record, PreferencePair)]


def _train(pairs: Sequence[PreferencePair], config: TrainConfig, out: Path) -> Network:
    network = load_reward_model(STARTER, config.reward_model)
    trees = _trees(network, pairs, config)
    run = Run.open(out, config, provenance(network, STARTER, DATA.name, trees, config.seed), resume=False)
    train(network, trees, config, run, stage="Reward model")
    return network


def _trees(network: Network, pairs: Sequence[PreferencePair], config: TrainConfig) -> list[Tree]:
    renderer = Renderer(network, config.max_tokens)
    return [renderer.tree(pair) for pair in pairs]


def _score(network: Network, pairs: Sequence[PreferencePair], config: TrainConfig) -> RewardReport:
    trees = _trees(network, pairs, config)
    engine = Engine(network, config.engine)
    scores: list[tuple[float, float]] = []
    with Progress("Test", len(trees), unit="tokens") as progress:
        for start in range(0, len(trees), _CHUNK):
            chunk = trees[start : start + _CHUNK]
            scores += [(float(better[0]), float(worse[0])) for better, worse in engine.forward(chunk)]
            progress.advance(len(chunk), work=sum(map(len, chunk)))
    chosen, rejected = zip(*scores, strict=True)
    lengths = [[len(branch.tokens_L) for branch in tree.branches] for tree in trees]
    longer, shorter = zip(*lengths, strict=True)
    return evaluate_rewards(chosen, rejected, chosen_lengths=longer, rejected_lengths=shorter)


def _bag_of_words(train_pairs: Sequence[PreferencePair], test_pairs: Sequence[PreferencePair]) -> RewardReport:
    """Logistic regression without intercept on count(chosen) − count(rejected); each pair is seen both ways round."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = [_texts(pair) for pair in train_pairs]
    counter = CountVectorizer().fit([text for pair in texts for text in pair])

    def difference(pairs: Sequence[tuple[str, str]]) -> Any:
        chosen, rejected = zip(*pairs, strict=True)
        return counter.transform(chosen) - counter.transform(rejected)

    rows = difference(texts)
    labels = np.repeat([1, 0], len(texts))
    model = LogisticRegression(C=0.01, fit_intercept=False, max_iter=1000).fit(vstack([rows, -rows]), labels)
    margins = model.decision_function(difference([_texts(pair) for pair in test_pairs]))
    return evaluate_rewards(margins.tolist(), [0.0] * len(margins))


def _texts(pair: PreferencePair) -> tuple[str, str]:
    chosen, rejected = (
        content if isinstance(content, str) else "\n".join(message.content for message in content)
        for content in (pair.chosen, pair.rejected)
    )
    return chosen, rejected


def _answer(table: dict[str, Accuracy]) -> dict[str, Any]:
    return {
        name.replace(" ", "_"): {
            "accuracy": round(accuracy.value, 4),
            "low": round(accuracy.interval.low, 4),
            "high": round(accuracy.interval.high, 4),
            "n": accuracy.n,
        }
        for name, accuracy in table.items()
    }


if __name__ == "__main__":
    main()
