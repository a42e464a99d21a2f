"""Rules for preferences: contradictions, cycles, and whether the longer completion wins."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from accord.data.check.report import CheckReport
from accord.data.check.rules import ENOUGH, Item, Places, Rule, best_and_worst, digest
from accord.data.problems import Problem
from accord.data.usable import pairs, squash
from accord.stats.intervals import wilson
from accord.types import PreferencePair, Ranking, Source

__all__ = ["Contradictions", "LongerWins"]

U64 = NDArray[np.uint64]

_LONGER_WINS_LIMIT = 0.65
_LISTED = 5
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Contradictions(Rule):
    """Every preference is an edge from the better to the worse completion of one prompt. E = edges.

    Two opposite edges are a contradiction. What is circular among the other edges is a cycle: completions that lie in
    one strongly connected component.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.prompts, self.winners, self.losers, self.numbers = (array("Q") for _ in range(4))

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.sound:
            for pair in pairs(record) if isinstance(record, Ranking) else [record]:
                if isinstance(pair, PreferencePair):
                    self.prompts.append(digest(squash(pair.prompt)))
                    self.winners.append(digest(squash(pair.chosen)))
                    self.losers.append(digest(squash(pair.rejected)))
                    self.numbers.append(self.places.number(item.source))
        return iter(())

    def end(self, report: CheckReport) -> None:
        if not self.prompts:
            return
        prompt_E = np.frombuffer(self.prompts, np.uint64)
        winner_E, loser_E = np.frombuffer(self.winners, np.uint64), np.frombuffer(self.losers, np.uint64)
        contradicted_E = self._contradictions(report, prompt_E, winner_E, loser_E)
        kept = np.flatnonzero(~contradicted_E)
        # One node is a completion of a prompt; the product keeps equal texts of different prompts apart.
        self._cycles(report, kept, prompt_E[kept] * _MIX ^ winner_E[kept], prompt_E[kept] * _MIX ^ loser_E[kept])

    def _contradictions(self, report: CheckReport, prompt_E: U64, winner_E: U64, loser_E: U64) -> NDArray[np.bool_]:
        """Report the edges that go against an earlier one; return which edges have any opposite."""
        low_E, high_E = np.minimum(winner_E, loser_E), np.maximum(winner_E, loser_E)
        order = np.lexsort((high_E, low_E, prompt_E))  # stable: within a group the rows stay in order
        keys = np.stack([prompt_E, low_E, high_E])[:, order]
        group = np.concatenate([[0], np.cumsum((keys[:, 1:] != keys[:, :-1]).any(axis=0))])
        first = order[np.searchsorted(group, np.arange(group[-1] + 1))][group]
        opposite = (winner_E == low_E)[order] != (winner_E == low_E)[first]
        against = np.stack([order[opposite], first[opposite]])[:, np.argsort(order[opposite])]
        if against.size:
            examples = [
                Problem("contradiction", here, f"The opposite preference is at {there}.")
                for here, there in ((self._place(edge), self._place(other)) for edge, other in against[:, :_LISTED].T)
            ]
            fix = "Keep the majority, or leave both if annotators really disagree."
            report.add("contradiction", examples[0].what, fix, against.shape[1], examples)
        contradicted = np.zeros(len(order), np.bool_)
        contradicted[order] = np.isin(group, group[opposite])
        return contradicted

    def _cycles(self, report: CheckReport, edges: NDArray[np.intp], winner_E: U64, loser_E: U64) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        nodes, ends = np.unique(np.concatenate([winner_E, loser_E]), return_inverse=True)
        if not nodes.size:
            return
        from_E, to_E = ends[: len(edges)], ends[len(edges) :]
        graph = coo_array((np.ones(len(edges), np.int8), (from_E, to_E)), shape=(len(nodes), len(nodes)))
        _, component_N = connected_components(graph, directed=True, connection="strong")
        inside = np.flatnonzero(component_N[from_E] == component_N[to_E])
        circle = component_N[from_E[inside]]
        _, starts = np.unique(circle, return_index=True)
        examples = []
        for start in np.sort(starts)[:_LISTED]:
            steps = [(int(from_E[e]), int(to_E[e]), int(edges[e])) for e in inside[circle == circle[start]]]
            here, *others = [self._place(edge) for edge in _shortest_cycle(steps)]
            told = ", ".join(dict.fromkeys(map(str, others)))
            what = f"With {told} this preference runs in a circle of {1 + len(others)} completions."
            examples.append(Problem("cycle", here, what))
        if examples:
            fix = "No score can satisfy all of them: look at the prompt again, or remove its weakest preference."
            report.add("cycle", examples[0].what, fix, len(starts), examples)

    def _place(self, edge: int) -> Source:
        return self.places[self.numbers[edge]]


def _shortest_cycle(steps: list[tuple[int, int, int]]) -> list[int]:
    """The edges of a shortest cycle through the first step of (winner, loser, edge), breadth first."""
    following: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for winner, loser, edge in steps:
        following[winner].append((loser, edge))
    goal, start, first = steps[0]
    came: dict[int, tuple[int, int]] = {}
    waiting = deque([start])
    while goal not in came:
        node = waiting.popleft()
        for other, edge in following[node]:
            if other not in came and other != start:
                came[other] = (node, edge)
                waiting.append(other)
    path, node = [], goal
    while node != start:
        node, edge = came[node]
        path.append(edge)
    return [first, *reversed(path)]


class LongerWins(Rule):
    """How often the longer completion is preferred; of a ranking, the best against the worst."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def see(self, item: Item) -> Iterator[Problem]:
        for record in item.sound:
            if isinstance(record, PreferencePair | Ranking):
                sides = best_and_worst(record) if isinstance(record, Ranking) else (record.chosen, record.rejected)
                better, worse = (len(squash(side)) for side in sides)
                self.counts["longer" if better > worse else "shorter" if better < worse else "equal"] += 1
        return iter(())

    def end(self, report: CheckReport) -> None:
        unequal = self.counts["longer"] + self.counts["shorter"]
        if not unequal:
            return
        rate, bounds = self.counts["longer"] / unequal, wilson(self.counts["longer"], unequal)
        text = f"{rate:.1%} of {unequal:,} comparisons of different length"
        report.figures["longer completion wins"] = f"{text} (95 % interval {bounds.low:.1%} to {bounds.high:.1%})"
        if unequal >= ENOUGH and rate > _LONGER_WINS_LIMIT:
            fix = "Expect a preference for length: report length beside every score, or balance the pairs."
            report.add("longer-wins", f"The longer completion wins in {text}.", fix, self.counts["longer"])
