"""The comparison as a table, a sentence, JSON and Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mosa_kernels.train.comparison import Contender, Outcome

MECHANISM_TITLES = {
    "fixed": "one fixed expert (average of N)",
    "stochastic": "a random expert in each adapter",
    "ensemble": "ensemble of the N experts (mean of logits)",
    "mean": "merged by mean",
    "jigsaw": "merged by jigsaw (Eq. 7, unscaled)",
}


@dataclass(frozen=True)
class Summary:
    """One contender over all seeds; accuracies in percent, spreads are sample standard deviations."""

    contender: Contender
    accuracies: tuple[float, ...]
    nlls: tuple[float, ...]
    seconds: float
    trained: int
    stored: int
    mechanisms: dict[str, dict[str, float]]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        return spread(self.accuracies)

    @property
    def nll(self) -> float:
        return statistics.fmean(self.nlls)

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.contender.title,
            "accuracy": self.accuracy,
            "accuracy_spread": self.spread,
            "accuracies": list(self.accuracies),
            "nll": self.nll,
            "nll_spread": spread(self.nlls),
            "seconds": self.seconds,
            "parameters_trained": self.trained,
            "parameters_stored": self.stored,
            "mechanisms": self.mechanisms,
        }


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summarise(outcomes: Sequence[Outcome]) -> list[Summary]:
    """One summary a contender, in the order in which they first appear, their seeds in increasing order."""
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.contender.key, []).append(outcome)
    summaries = []
    for group in grouped.values():
        group.sort(key=lambda outcome: outcome.seed)
        mechanisms = {}
        for name in group[0].measured:
            rows = [outcome.measured[name] for outcome in group]
            mechanisms[name] = {
                "accuracy": statistics.fmean(row["accuracy"] for row in rows),
                "accuracy_spread": spread([row["accuracy"] for row in rows]),
                "nll": statistics.fmean(row["nll"] for row in rows),
            }
        summaries.append(
            Summary(
                contender=group[0].contender,
                accuracies=tuple(outcome.accuracy for outcome in group),
                nlls=tuple(outcome.nll for outcome in group),
                seconds=statistics.fmean(outcome.seconds for outcome in group),
                trained=group[0].trained,
                stored=group[0].stored,
                mechanisms=mechanisms,
            )
        )
    return summaries


def difference(left: Summary, right: Summary) -> str:
    """How far `left` is from `right` in words, from the differences seed by seed."""
    paired = [a - b for a, b in zip(left.accuracies, right.accuracies, strict=True)]
    mean = statistics.fmean(paired)
    words = f"{abs(mean):.1f} points {'ahead of' if mean >= 0 else 'behind'} {right.contender.title}"
    if len(paired) < 2:
        return f"{words} (one seed: no spread known)"
    error = spread(paired) / math.sqrt(len(paired))
    side = "more" if abs(mean) > 2 * error else "less"
    ahead = sum(value > 0 for value in paired)
    return f"{words} ({side} than two standard errors of {error:.1f}; ahead in {ahead} of {len(paired)} seeds)"


def verdict(summaries: Sequence[Summary]) -> str:
    """Who wins by how much, computed from the numbers."""
    ranked = sorted(summaries, key=lambda summary: summary.accuracy, reverse=True)
    best = ranked[0]
    plus = f" ± {best.spread:.1f}" if len(best.accuracies) > 1 else ""
    sentence = f"{best.contender.title} has the highest accuracy here, {best.accuracy:.1f}{plus} %"
    mosa = [summary for summary in ranked if summary.contender.method == "mosa"]
    others = [summary for summary in ranked if summary.contender.method != "mosa"]
    plain = [summary for summary in others if summary.contender.key == "adaptformer"]
    if not mosa or not others:
        return sentence + "."
    rival = others[0]
    parts = [difference(mosa[0], rival)]
    if plain and plain[0] is not rival:
        parts.append(difference(mosa[0], plain[0]))
    return f"{sentence}. The best MoSA ({mosa[0].contender.title}) is {', and '.join(parts)}."


def rows_of_methods(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """A heading and a row a method."""
    rows: list[tuple[str, ...]] = [("method", "accuracy %", "NLL", "trained", "stored", "seconds")]
    for s in summaries:
        rows.append(
            (
                s.contender.title,
                f"{s.accuracy:.1f} ± {s.spread:.1f}",
                f"{s.nll:.2f}",
                f"{s.trained:,}",
                f"{s.stored:,}",
                f"{s.seconds:.1f}",
            )
        )
    return rows


def rows_of_mechanisms(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """A heading and a row for each inference mechanism, a column for each MoSA."""
    mosa = [summary for summary in summaries if summary.contender.method == "mosa"]
    rows: list[tuple[str, ...]] = [("MoSA at inference, accuracy %", *(s.contender.title for s in mosa))]
    for name, title in MECHANISM_TITLES.items():
        cells = [s.mechanisms.get(name) for s in mosa]
        shown = [f"{c['accuracy']:.1f} ± {c['accuracy_spread']:.1f}" if c else "-" for c in cells]
        rows.append((title, *shown))
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """GitHub's kind of table, numbers to the right."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines)
