"""Merge, optimizer and alignment: every provider that is there passes the gate, and a wrong one has no time."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo import config as dynamo

from mosa_kernels.bench import kernels, records, report, run
from mosa_kernels.bench.adapter import Adapter
from mosa_kernels.bench.case import Case, Prepared, Provider
from mosa_kernels.bench.kernels import OPERATOR_NAMES, Effort, admit, cases, measure_case, of_a_model
from mosa_kernels.bench.limits import Limits
from mosa_kernels.bench.masked_adamw import Copies
from mosa_kernels.bench.shapes import Axes, Point

CPU = torch.device("cpu")
LIMITS = Limits(10.0, {"fp32": 0.1, "bf16": 0.1})
BRIEF = Effort(rounds=3, seconds=0.1)
SMALL = Point("swin_b_4", 1, 8, 3)


@pytest.mark.parametrize("operator", ["merge", "masked_adamw", "alignment"])
@pytest.mark.parametrize("point", [SMALL, SMALL._replace(dtype="bf16", expert_per="call")], ids=str)
def test_every_available_provider_passes_the_gate(operator: str, point: Point) -> None:
    (case,) = cases((operator,), (point,), CPU, BRIEF)
    green = set()
    for provider in case.providers():
        row: dict = {}
        admit(case, provider, row)
        assert row["status"] in ("ok", "unavailable"), (provider.name, row)
        if row["status"] == "ok":
            green.add(provider.name)
            assert row["error"]["relative"] <= 2 * row["error"]["eager"] + 1e-6
    assert "eager" in green
    assert ("N copies" in green) == (operator != "alignment")
    if operator != "alignment":
        assert "cpu" in green


def test_inactive_experts_stand_still_in_the_optimizer_case() -> None:
    (case,) = cases(("masked_adamw",), (SMALL._replace(expert_per="call", layers=1),), CPU, BRIEF)
    before = torch.cat([p.reshape(-1) for p in case.state.params])  # type: ignore[attr-defined]
    eager = next(provider for provider in case.providers() if provider.name == "eager")
    after = eager.prepare().results()["params"]
    owners = torch.cat(
        [
            torch.zeros(p.numel()) if owner is None else owner.reshape(-1).float()
            for p, owner in zip(case.state.params, case.state.owners, strict=True)  # type: ignore[attr-defined]
        ]
    )
    assert torch.equal(before[owners > 0], after[owners > 0])
    assert not torch.equal(before[owners == 0], after[owners == 0])


def test_a_model_has_an_adapter_a_block_and_each_case_comes_once() -> None:
    points = [Point("vit_l", images, dtype=dtype) for images in (1, 2) for dtype in ("fp32", "bf16")]
    assert [point.layers for point in of_a_model(points, "merge")] == [24, 24]
    assert [point.dtype for point in of_a_model(points, "masked_adamw")] == ["fp32"]
    assert {point.layers for point in of_a_model(points, "alignment")} == {12}


def with_extra(case: Case, extra: Provider) -> Case:
    """The case with one more provider of ours."""
    providers = [*case.providers(), extra]
    case.providers = lambda: providers  # type: ignore[method-assign]
    return case


def wrong(case: Case) -> Prepared:
    prepared = next(p for p in case.providers() if p.name == "eager").prepare()
    return prepared._replace(results=lambda: {"out": prepared.results()["out"] * 1.01})


def test_a_wrong_result_has_no_time_in_any_form() -> None:
    case = Adapter(SMALL, CPU).case("forward")
    record = measure_case(with_extra(case, Provider("hasty", lambda: wrong(case), ours=True)), CPU, LIMITS, BRIEF)
    row = next(row for row in record["rows"] if row["provider"] == "hasty")
    assert row["status"] == "red"
    assert row["reason"].startswith("error gate red: out: relative error")
    assert not {"ms", "speed_up", "copy_share", "host_us"} & row.keys()
    line = next(line for line in report.kernel_section(record).splitlines() if line.startswith("| hasty"))
    assert "error gate red" in line
    assert records.failures({"kernels": [record]}) == [
        f"adapter_forward, {records.name_of(record['case'])}, hasty: {row['reason']}"
    ]
    assert all("ms" in row for row in record["rows"] if row["status"] == "ok")


def test_a_provider_that_breaks_is_reported_with_its_message() -> None:
    def breaks() -> Prepared:
        raise RuntimeError("out of luck\nand more")

    case = Adapter(SMALL, CPU).case("forward")
    record = measure_case(with_extra(case, Provider("broken", breaks, ours=True)), CPU, LIMITS, BRIEF)
    row = record["rows"][-1]
    assert (row["status"], row["reason"]) == ("failed", "out of luck")
    assert records.failures({"kernels": [record]})
    eager = next(row for row in record["rows"] if row["provider"] == "eager")
    assert eager["speed_up"] == 1


def test_the_time_stands_where_memory_cannot_be_measured() -> None:
    def graph() -> None:
        raise RuntimeError("no hooks here")

    def prepare() -> Prepared:
        eager = next(p for p in case.providers() if p.name == "eager")
        return eager.prepare()._replace(graph=graph)

    case = Adapter(SMALL, CPU).case("forward")
    row = measure_case(with_extra(case, Provider("odd", prepare, ours=True)), CPU, LIMITS, BRIEF)["rows"][-1]
    assert row["status"] == "ok"
    assert row["ms"]["median"] > 0
    assert row["note"].endswith("no hooks here")


def test_a_case_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(case: Case, *rest: object) -> dict:
        if case.operator == "merge":
            raise MemoryError("not enough")
        return measure_case(case, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "measure_case", breaks)
    axes = Axes(model=("swin_b_4",), images=(1,), bottleneck=(8,))
    made = run.measure(run.Request("smoke", ("merge", "alignment"), "cpu", axes))
    assert [each["operator"] for each in made["kernels"]] == ["alignment"]
    (line,) = records.failures(made)
    assert line.startswith("merge: d 1024")
    assert line.endswith("not enough")


def test_nothing_is_compiled_once_time_is_up() -> None:
    effort = Effort(rounds=3, seconds=0.1, compiled=("compile",), compile_until=0)
    record = measure_case(Adapter(SMALL, CPU, ("compile",)).case("forward"), CPU, LIMITS, effort)
    row = next(row for row in record["rows"] if row["provider"] == "compile")
    assert row["reason"] == kernels.NO_TIME


def test_chosen_providers_alone_are_listed() -> None:
    effort = Effort(rounds=3, seconds=0.1, providers=("eager", "cpu"))
    record = measure_case(Adapter(SMALL, CPU).case("both"), CPU, LIMITS, effort)
    assert [row["provider"] for row in record["rows"]] == ["eager", "cpu"]


def test_compiled_providers_run_in_every_direction() -> None:
    with kernels.fresh_compiler():
        for operator in ("adapter_forward", "adapter_backward"):
            effort = Effort(rounds=3, seconds=0.1, compiled=("compile",), providers=("compile",))
            (case,) = cases((operator,), (SMALL,), CPU, effort)
            (row,) = measure_case(case, CPU, LIMITS, effort)["rows"]
            assert row["status"] == "ok", row


@pytest.mark.parametrize("operator", ["adapter_forward", "alignment"])
def test_every_point_is_compiled_however_many_there_are(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    effort = Effort(rounds=3, seconds=0.1, compiled=("compile",), providers=("compile",))
    points = [SMALL._replace(model=model) for model in ("swin_b_4", "vit_ti", "vit_s")]
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compiled(f, backend="eager", **options))
    with dynamo.patch(recompile_limit=2), kernels.fresh_compiler():
        for case in cases((operator,), points, CPU, effort):
            (row,) = measure_case(case, CPU, LIMITS, effort)["rows"]
            assert row["status"] == "ok", row


@pytest.mark.parametrize("operator", ["merge", "masked_adamw"])
def test_merge_and_optimizer_are_compiled_where_asked_for(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: program(f, backend="aot_eager", **options))
    effort = Effort(rounds=3, seconds=0.1, compiled=("compile",), providers=("compile", "eager", "merged dense"))
    with kernels.fresh_compiler():
        (case,) = cases((operator,), (SMALL._replace(model="vit_ti", expert_per="call"),), CPU, effort)
        rows = {row["provider"]: row for row in measure_case(case, CPU, LIMITS, effort)["rows"]}
    assert rows["compile"]["status"] == "ok", rows
    assert rows["merged dense"]["reason"] == kernels.NOT_OFFERED


def test_copies_of_the_optimizer_hold_n_of_everything() -> None:
    (case,) = cases(("masked_adamw",), (SMALL._replace(expert_per="call"),), CPU, BRIEF)
    copies = Copies(case.state)  # type: ignore[attr-defined]
    params = copies._moved[0]
    layers = len(case.state.params) // 2  # type: ignore[attr-defined]
    assert len(copies._copies) == 3
    assert len(params) == 2 * layers  # one active expert of each, and the ordinary weights


@pytest.mark.parametrize("point", [SMALL, SMALL._replace(dtype="bf16", expert_per="call")], ids=str)
def test_every_kind_of_split_is_set_beside_random_entries(point: Point) -> None:
    forward, both = cases(
        ("granularity",), (point, point._replace(model="vit_ti"), point._replace(experts=1)), CPU, BRIEF
    )
    assert (forward.key["pass"], both.key["pass"]) == ("forward", "forward + backward")
    for case in (forward, both):
        rows = {row["provider"]: row for row in measure_case(case, CPU, LIMITS, BRIEF)["rows"]}
        assert all(row["status"] in ("ok", "unavailable") for row in rows.values()), rows
        times = {name: row["ms"]["median"] for name, row in rows.items() if "ms" in row}
        kinds = ("element", "block", "row", "column")
        assert list(times) == ["eager", *(f"cpu, {kind}" for kind in kinds)]
        for kind in kinds[1:]:
            assert rows[f"cpu, {kind}"]["gain"] == pytest.approx(times["cpu, element"] / times[f"cpu, {kind}"])
        assert "gain" not in rows["cpu, element"]
    # each is held to its own split: the results of one do not pass for those of another
    providers = {provider.name: provider for provider in both.providers()}
    owners = {kind: adapter.drawn.layers[0].assignment for kind, adapter in both._adapters.items()}  # type: ignore[attr-defined]
    assert all((owners["column"] == owners["column"][:1]).flatten().tolist())
    assert not both.expected("column").check(providers["cpu, row"].prepare().results()).green
    assert both.expected("row").check(providers["cpu, row"].prepare().results()).green


def test_one_family_of_providers_can_be_asked_for() -> None:
    case = next(iter(cases(("granularity",), (SMALL,), CPU, BRIEF)))
    effort = Effort(rounds=3, seconds=0.1, providers=("cpu", "merged dense"))
    rows = {row["provider"]: row for row in measure_case(case, CPU, LIMITS, effort)["rows"]}
    assert list(rows) == ["merged dense", *(f"cpu, {kind}" for kind in ("element", "block", "row", "column"))]
    assert rows["merged dense"]["reason"] == kernels.NOT_OFFERED


def test_all_operators_have_cases_the_adapter_first() -> None:
    found = [case.operator for case in cases(OPERATOR_NAMES, (SMALL, SMALL._replace(bottleneck=16)), CPU, BRIEF)]
    assert set(found) == set(OPERATOR_NAMES)
    assert found[:6] == ["adapter_forward", "adapter_backward", "adapter"] * 2


def test_what_no_time_is_left_for_is_named_and_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: object, **__: object) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr(torch, "randn", draw)
    for case in cases(OPERATOR_NAMES, (SMALL,), CPU, BRIEF):
        assert records.name_of(case.key)
        assert case.floor.bytes > 0
        assert case.working_set > 0
        assert case.providers()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_counts_what_it_reads_and_writes(dtype: str) -> None:
    (case,) = cases(("merge",), (SMALL._replace(dtype=dtype),), CPU, BRIEF)
    read = [t for adapter in case.adapters for t in adapter if isinstance(t, torch.Tensor)]  # type: ignore[attr-defined]
    eager = next(provider for provider in case.providers() if provider.name == "eager")
    moved = [*read, *eager.prepare().results().values()]
    assert case.floor.bytes == sum(tensor.numel() * tensor.itemsize for tensor in moved)
