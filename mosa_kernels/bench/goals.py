"""The goals of the kernels, and what a report says about each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from mosa_kernels.bench.case import COMPILE, COMPILE_MAX, EAGER
from mosa_kernels.bench.records import Record, name_of, row_of, same_calls

NOT_MEASURED = "not measured"


class Goal(NamedTuple):
    """One figure that a backend has to reach."""

    name: str
    must: float
    unit: str  # what stands behind the figure
    at_most: bool = False  # the figure has to stay below


class Answer(NamedTuple):
    """What was found for a goal."""

    case: str
    backend: str
    goal: Goal
    value: float | None  # None: not measured
    among: int = 1  # of so many figures it is the worst

    @property
    def verdict(self) -> str:
        if self.value is None:
            return NOT_MEASURED
        met = self.value <= self.goal.must if self.goal.at_most else self.value >= self.goal.must
        return "met" if met else "missed"

    @property
    def shown(self) -> str:
        if self.value is None:
            return NOT_MEASURED
        return f"{self.value:.2f}{self.goal.unit}" + (f", lowest of {self.among}" if self.among > 1 else "")


_Figure = Callable[[Record, Record], float | None]


def _against(provider: str) -> _Figure:
    def ratio(record: Record, ours: Record) -> float | None:
        theirs = row_of(record, provider)
        return None if theirs is None else theirs["ms"]["median"] / ours["ms"]["median"]

    return ratio


def _of_row(*path: str, over: Callable[[Record], float] | None = None) -> _Figure:
    def figure(record: Record, ours: Record) -> float | None:
        value = ours
        for name in path:
            if value is None or value.get(name) is None:
                return None
            value = value[name]
        return float(value) / (over(record) if over else 1.0)  # type: ignore[arg-type]

    return figure


def _wall_against_eager(record: Record, ours: Record) -> float | None:
    eager = row_of(record, EAGER)
    if eager is None or not eager.get("host_us") or not ours.get("host_us"):
        return None
    return eager["host_us"]["wall"] / ours["host_us"]["wall"]


def _tokens(record: Record) -> float:
    images, tokens = record["case"]["shape"].rpartition(", ")[2].split(" x ")
    return float(images) * float(tokens) * record["case"]["layers"]


_GPU: dict[str, list[tuple[Goal, _Figure]]] = {
    "adapter_forward": [
        (Goal("share of the measured copy bandwidth on 3A", 0.8, ""), _of_row("copy_share")),
        (Goal("times as fast as eager", 3.5, "x"), _against(EAGER)),
        (Goal("times as fast as compile", 1.7, "x"), _against(COMPILE)),
        (Goal("times as fast as compile max-autotune", 1.7, "x"), _against(COMPILE_MAX)),
        (Goal("launches", 1, "", at_most=True), _of_row("launches")),
    ],
    "adapter": [
        (Goal("share of the measured copy bandwidth on its own bytes", 0.8, ""), _of_row("copy_share")),
        (Goal("times as fast as eager", 2.7, "x"), _against(EAGER)),
        (Goal("times as fast as compile", 1.5, "x"), _against(COMPILE)),
        (Goal("times as fast as compile max-autotune", 1.5, "x"), _against(COMPILE_MAX)),
        (Goal("saved bytes a token", 8.1, " B", at_most=True), _of_row("saved_bytes", over=_tokens)),
    ],
}
_GPU_ONE_IMAGE: dict[str, list[tuple[Goal, _Figure]]] = {
    "adapter_forward": [(Goal("host time a call", 15, " us", at_most=True), _of_row("host_us", "host"))],
    "adapter": [(Goal("times as fast as eager, end to end in a row of calls", 1, "x"), _wall_against_eager)],
}
_CPU: dict[tuple[str, str], float] = {
    ("adapter_forward", "fp32"): 2.0,
    ("adapter_forward", "bf16"): 2.5,
    ("adapter", "fp32"): 1.5,
    ("adapter", "bf16"): 1.8,
}
GOAL_MODELS = ("vit_b", "vit_l")


def answers(report: Record) -> list[Answer]:
    """Every goal that holds for the report's kind of device, for each fused backend of that kind.

    Where a CPU's report times a call several times, the lowest ratio counts.
    """
    on_gpu = report["machine"]["device_type"] == "cuda"
    backends = ("triton", "cuda") if on_gpu else ("cpu",)
    return [answer for backend in backends for answer in _answers(report, backend, on_gpu)]


def _answers(report: Record, backend: str, on_gpu: bool) -> Iterator[Answer]:
    for record in report.get("kernels", []):
        case, operator = record["case"], record["operator"]
        if operator == "masked_adamw" and on_gpu:
            yield _answer(record, backend, Goal("launches", 1, "", True), _of_row("launches"))
            continue
        if not operator.startswith("adapter") or case["r"] != 64 or case["N"] != 4 or case["layers"] != 1:
            continue
        model, one_image = case["shape"].split(",")[0], ", 1 x" in case["shape"]
        if model not in GOAL_MODELS:
            continue
        if on_gpu and case["dtype"] == "bf16":
            for goal, figure in (_GPU_ONE_IMAGE if one_image else _GPU).get(operator, []):
                yield _answer(record, backend, goal, figure)
        elif not on_gpu and not one_image and model == "vit_b" and (operator, case["dtype"]) in _CPU:
            must = _CPU[operator, case["dtype"]]
            goal, figure = Goal("times as fast as eager", must, "x"), _against(EAGER)
            found = [figure(*call) for call in same_calls(report, record, backend)]
            ratios = [ratio for ratio in found if ratio is not None]
            answer = _answer(record, backend, goal, figure)
            yield answer._replace(value=min(ratios, default=None), among=len(ratios))


def _answer(record: Record, backend: str, goal: Goal, figure: _Figure) -> Answer:
    ours = row_of(record, backend)
    value = None if ours is None else figure(record, ours)
    return Answer(f"{record['operator']}, {name_of(record['case'])}", backend, goal, value)
