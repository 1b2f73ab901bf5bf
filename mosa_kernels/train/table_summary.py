"""What a table says: means and spreads over seeds, both kinds of mean, and tests of the claimed differences."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mosa_kernels.data.published import GROUPS, PUBLISHED
from mosa_kernels.train.comparison_report import spread
from mosa_kernels.train.paired_tests import paired_t, signed_rank
from mosa_kernels.train.table_grid import Measured
from mosa_kernels.train.table_spec import Row, Table

LEVEL = 0.05  # of the tests
MEAN, GROUP_MEAN = "mean", "mean of groups"


@dataclass(frozen=True)
class Value:
    """Ours in one column: percent by seed, and how many runs left the finite numbers."""

    by_seed: tuple[float, ...]
    failed: int = 0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed) if self.by_seed else math.nan

    @property
    def spread(self) -> float:
        return spread(self.by_seed)

    def __str__(self) -> str:
        if not self.by_seed:
            return "failed"
        plus = f" ± {self.spread:.2f}" if len(self.by_seed) > 1 else ""
        return f"{self.mean:.2f}{plus}" + (f" ({self.failed} failed)" if self.failed else "")


@dataclass(frozen=True)
class Summary:
    """A row in all columns: the tasks, the groups where there are any, the mean over tasks and that over groups.

    Attributes:
        row: of the table.
        values: ours, by column.
        paper: printed, by column.
        parameters: trained ones without the head, in millions.
    """

    row: Row
    values: Mapping[str, Value]
    paper: Mapping[str, float]
    parameters: float


def summarise_table(table: Table, measured: Mapping[str, Mapping[str, Measured]]) -> list[Summary]:
    """One summary a row.

    The paper prints the mean over VTAB's three groups in Table 2 and that over its 19 tasks in Table 15 (but for VPT,
    which has the mean over tasks in both); its figures stand beside the mean that they are.
    """
    return [_summary(table, row, measured[row.key]) for row in table.rows]


def _summary(table: Table, row: Row, tasks: Mapping[str, Measured]) -> Summary:
    values = {name: _value(found.accuracies) for name, found in tasks.items()}
    groups: dict[str, list[str]] = {}
    for task in table.tasks:
        if task.group:
            groups.setdefault(task.group, []).append(task.name)
    for group, members in groups.items():
        values[group] = _mean([tasks[name].accuracies for name in members])
    values[MEAN] = _mean([found.accuracies for found in tasks.values()])
    if groups:
        by_group = [_means([tasks[name].accuracies for name in members]) for members in groups.values()]
        values[GROUP_MEAN] = _mean(by_group)
    paper = dict(row.paper)
    over_groups = table.number == "2" and not row.variant.startswith("vpt")
    if over_groups and MEAN in paper:
        paper[GROUP_MEAN] = paper.pop(MEAN)
    parameters = next(iter(tasks.values())).parameters / 1e6
    return Summary(row, values, paper, parameters)


def printed_mean(row: Row) -> float | None:
    """The paper's mean over tasks of a row, from its columns: of tasks, or of VTAB's groups by their numbers of tasks.

    Where it prints neither, the printed mean; None where there is none. The printed means of one column are not all of
    one kind (Table 2), nor all those of their columns (Table 4).
    """
    tasks = [value for name, value in row.paper.items() if name not in (MEAN, *GROUPS)]
    if tasks:
        return statistics.fmean(tasks)
    if all(group in row.paper for group in GROUPS):
        sizes = [sum(known.group == group for known in PUBLISHED) for group in GROUPS]
        return sum(size * row.paper[group] for size, group in zip(sizes, GROUPS, strict=True)) / sum(sizes)
    return row.paper.get(MEAN)


def _means(rows: Sequence[Sequence[float | None]]) -> tuple[float | None, ...]:
    """The mean over rows, seed by seed; None where one of them failed."""
    found: list[float | None] = []
    for values in zip(*rows, strict=True):
        known = [value for value in values if value is not None]
        found.append(statistics.fmean(known) if len(known) == len(values) else None)
    return tuple(found)


def _mean(rows: Sequence[Sequence[float | None]]) -> Value:
    return _value(_means(rows))


def _value(by_seed: Sequence[float | None]) -> Value:
    known = tuple(value for value in by_seed if value is not None)
    return Value(known, len(by_seed) - len(known))


@dataclass(frozen=True)
class Difference:
    """One row against another, run by run.

    Attributes:
        better, worse: titles; the paper, or nobody, says that the first is better.
        claimed: whether the paper says so.
        paper: its difference in points, where it prints both.
        points: ours, the mean over tasks by seed.
        t_p: p of the paired t-test over seeds, two-sided; None of fewer than two.
        wilcoxon_p: p of Wilcoxon's signed-rank test over all pairs of task and seed; None of fewer than six.
        pairs: how many such pairs.
        task: the task, where it is about one alone.
    """

    better: str
    worse: str
    claimed: bool
    paper: float | None
    points: tuple[float, ...]
    t_p: float | None
    wilcoxon_p: float | None
    pairs: int
    task: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.points) if self.points else math.nan

    @property
    def verdict(self) -> str:
        """What the seeds say: "higher", "lower" or "undecided" at the level of 5 %."""
        if self.t_p is None or not self.t_p < LEVEL:
            return "undecided"
        return "higher" if self.mean > 0 else "lower"

    def __str__(self) -> str:
        plus = f" ± {spread(self.points):.2f}" if len(self.points) > 1 else ""
        paper = "" if self.paper is None else f" (paper {self.paper:+.2f})"
        what = f"{self.better} against {self.worse}" + (f" on {self.task}" if self.task else "")
        if not self.points:
            return f"{what}: runs failed{paper}"
        tests = [f"{len(self.points)} seed(s)"]
        if self.t_p is not None:
            tests.append(f"paired t over seeds {_p(self.t_p)}")
        if self.wilcoxon_p is not None:
            tests.append(f"Wilcoxon over {self.pairs} pairs {_p(self.wilcoxon_p)}")
        points = f"{self.mean:+.2f}{plus} points{paper}"
        return f"{what}: {points}; {', '.join(tests)}: {self.verdict}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def differences_of(table: Table, measured: Mapping[str, Mapping[str, Measured]]) -> list[Difference]:
    """The differences that the paper claims, and those of its method to the controls; of the mean, or task by task."""
    rows = {row.key: row for row in table.rows}
    pairs = [(*pair, True) for pair in table.claims] + [(*pair, False) for pair in table.added]
    known = [(a, b, claimed) for a, b, claimed in pairs if a in rows and b in rows]
    if not table.by_task:
        return [_difference(rows[a], rows[b], measured[a], measured[b], claimed) for a, b, claimed in known]
    found = []
    for a, b, claimed in known:
        for task in table.tasks:
            one, other = ({task.name: measured[key][task.name]} for key in (a, b))
            found.append(dataclasses.replace(_difference(rows[a], rows[b], one, other, claimed), task=task.name))
    return found


def _difference(
    better: Row, worse: Row, left: Mapping[str, Measured], right: Mapping[str, Measured], claimed: bool
) -> Difference:
    by_task = []
    for name in left:
        by_task.append(
            [
                None if a is None or b is None else a - b
                for a, b in zip(left[name].accuracies, right[name].accuracies, strict=True)
            ]
        )
    points = _mean(by_task).by_seed
    every = [value for values in by_task for value in values if value is not None]
    printed = printed_mean(better), printed_mean(worse)
    return Difference(
        better=better.title,
        worse=worse.title,
        claimed=claimed,
        paper=None if printed[0] is None or printed[1] is None else printed[0] - printed[1],
        points=points,
        t_p=paired_t(points),
        wilcoxon_p=signed_rank(every),
        pairs=len(every),
    )
