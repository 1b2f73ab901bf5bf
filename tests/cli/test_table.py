"""`mosa-kernels table` on the smallest grid: it resumes, survives what is broken, and writes what it found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mosa_kernels.cli.main import app
from mosa_kernels.cli.table import restrict
from mosa_kernels.train import table_cells, table_runs
from mosa_kernels.train.folder import write_json
from mosa_kernels.train.loop import NonFiniteError, Trainer
from mosa_kernels.train.table_cells import Cell, find_result, run_cell
from mosa_kernels.train.table_grid import Grid
from mosa_kernels.train.table_runs import missing_cells, run_cells
from mosa_kernels.train.table_sources import Sources
from mosa_kernels.train.table_spec import Changes, read_table
from mosa_kernels.train.table_summary import printed_mean

SMALL = ["--quick", "--epochs", "1", "--seeds", "1", "--tuning-seeds", "1", "--workers", "1"]
TASK = ["--tasks", "digits, 10 labels a class"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["table", *arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 10 with its method alone: two runs that choose and one that tests, on 100 images."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("table")
    result = run("10", "--output", str(output), *SMALL, *TASK, "--rows", "mosa")
    assert result.exit_code == 0, result.output
    return output


def test_a_table_is_written_in_every_form(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {"cells", *(f"table-10.{s}" for s in ("md", "csv", "png", "json"))}
    cells = [json.loads(path.read_text()) for path in (made / "cells").iterdir()]
    assert sorted(cell["on"] for cell in cells) == ["test", "validation", "validation"]
    record = json.loads((made / "table-10.json").read_text())
    (tested,) = (cell for cell in cells if cell["on"] == "test")
    assert tested["settings"]["data_seed"] == 0
    for mechanism in ("fixed", "stochastic", "ensemble", "mean", "jigsaw"):
        (task,) = record["rows"][f"mosa/{mechanism}"]["tasks"].values()
        assert task["accuracies"] == [tested["measured"][mechanism]["accuracy"]]
    validation = {
        cell["settings"]["recipe"]["base_lr"]: cell["measured"]["mean"]["accuracy"]
        for cell in cells
        if cell["on"] == "validation"
    }
    assert len(validation) == 2
    assert validation[tested["settings"]["recipe"]["base_lr"]] == max(validation.values())
    assert record["runs_behind_the_table"] == 3
    assert record["seconds_of_these_runs_added_up"] == round(sum(cell["seconds"] for cell in cells))
    assert not any("wall" in key for key in record)  # of a command that resumed, it says nothing
    for cell in cells:
        assert cell["normalisation"]["mean"]
        assert len(cell["backbone"]["sha256"]) == 64
        assert "labels a class" in cell["data"]["note"]
    text = (made / "table-10.md").read_text()
    assert "QUICK" in text
    assert "89.27" in text
    assert (made / "table-10.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_is_drawn_as_curves(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    result = run("figure-3", "--output", str(tmp_path), *SMALL, "--rows", "adaptformer")
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "cells",
        *(f"figure-3.{s}" for s in ("md", "csv", "png", "json")),
    }
    record = json.loads((tmp_path / "figure-3.json").read_text())
    assert list(record["rows"]) == [f"adaptformer/{r}" for r in (4, 8, 16, 32, 64, 128, 256)]
    assert record["runs_behind_the_table"] == 2 + 7
    text = (tmp_path / "figure-3.md").read_text()
    assert text.startswith("# Figure 3: Bottleneck dimension")
    assert "AdaptFormer, bottleneck 4 |" in text
    assert (tmp_path / "figure-3.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_done_is_not_done_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def note(cell: Cell, folder: Path) -> dict[str, Any]:
        ran.append(cell.label)
        return table_cells.run_and_keep(cell, folder)

    monkeypatch.setattr(table_runs, "run_and_keep", note)
    before = (made / "table-10.csv").read_text()
    lost = sorted((made / "cells").glob("test-*"))[0]
    content = json.loads(lost.read_text())
    lost.unlink()
    again = run("10", "--output", str(made), *SMALL, *TASK, "--rows", "mosa")
    assert again.exit_code == 0, again.output
    assert len(ran) == 1
    assert json.loads(lost.read_text())["measured"] == content["measured"]
    assert (made / "table-10.csv").read_text() == before


def test_runs_of_other_data_are_not_mixed_in(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out")
    path = sorted((tmp_path / "out" / "cells").glob("tune-*.json"))[0]
    result = json.loads(path.read_text())
    result["data"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(result))
    words = ("10", "--output", str(tmp_path / "out"), *SMALL, *TASK, "--rows", "mosa")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    refused = run(*words)
    assert refused.exit_code == 1
    whole = " ".join(refused.output.split())
    assert "data offline:digits had the fingerprint 000000000000, now" in whole
    assert f"({path.name})" in whole
    assert "Put back what was there, or give another output folder" in whole
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")} == before
    assert "2 of the 2 are done" in run(*words, "--plan").output


def test_a_table_names_every_machine_that_made_a_run_of_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out")
    path = sorted((tmp_path / "out" / "cells").glob("test-*.json"))[0]
    result = json.loads(path.read_text())
    here, torch_here = result["machine"], result["versions"]["torch"]
    result |= {"machine": "Another, 64 core(s)", "device": "NVIDIA A100"}
    result["versions"]["torch"] = "2.0.0"
    path.write_text(json.dumps(result))
    again = run("10", "--output", str(tmp_path / "out"), *SMALL, *TASK, "--rows", "mosa")
    assert again.exit_code == 0, again.output
    record = json.loads((tmp_path / "out" / "table-10.json").read_text())
    assert record["machine"] == f"{here} (2 runs), NVIDIA A100 in Another, 64 core(s) (1 run)"
    assert record["versions"]["torch"] == f"{torch_here} (2 runs), 2.0.0 (1 run)"
    assert record["versions"]["timm"] == result["versions"]["timm"]
    assert f"- machine: {record['machine']}\n" in (tmp_path / "out" / "table-10.md").read_text()
    assert json.loads((made / "table-10.json").read_text())["machine"] == here


def test_tables_share_runs(made: Path) -> None:
    def missing(number: str, rows: tuple[str, ...]) -> set[str]:
        table = read_table(number)
        grid = Grid(table, Changes(recipe={"epochs": 1}), 1, 1)
        task = next(task for task in table.tasks if task.name == "digits, 10 labels a class")
        wanted = []
        for row in table.rows:
            if row.variant in rows:
                choice = grid.choose(row, task, made / "cells")
                wanted += grid.final_cells(row, task, choice)
        return {cell.label for cell in missing_cells(wanted, made / "cells")}

    assert missing("1", ("mosa",)) == set()
    assert len(missing("9", ("mosa", "mosa-n2"))) == 1


def small_cells(count: int) -> list[Cell]:
    table = read_table("9")
    grid = Grid(table, Changes(recipe={"epochs": 1}), 1, count)
    (row,) = (row for row in table.rows if row.variant == "adaptformer")
    return grid.tuning_cells(row, table.tasks[0])[0]


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    cells = small_cells(2)
    run_cells(cells, tmp_path / "two", 2)
    run_cells(cells[:1], tmp_path / "one", 1)
    results = [find_result(cells[0], tmp_path / name) for name in ("one", "two")]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0]["measured"]["plain"]["accuracy"] == results[1]["measured"]["plain"]["accuracy"]
    assert find_result(cells[1], tmp_path / "two") is not None


def test_a_run_that_fails_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = small_cells(1)

    def diverge(self: Trainer) -> None:
        raise NonFiniteError("the loss is nan")

    monkeypatch.setattr(Trainer, "fit", diverge)
    result = run_cell(cell)
    assert result["failed"] == "the loss is nan"
    assert table_cells.accuracy_of(result) is None


def test_a_run_whose_outputs_are_not_finite_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be finite and what comes of them not."""
    (cell,) = small_cells(1)

    @torch.no_grad()
    def diverge(self: Trainer) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(3e38)

    monkeypatch.setattr(Trainer, "fit", diverge)
    result = run_cell(cell)
    assert f"outputs for {result['on']} images are not finite after epoch" in result["failed"]
    assert table_cells.accuracy_of(result) is None


def test_figures_whose_runs_lie_elsewhere_are_not_lost(made: Path, tmp_path: Path) -> None:
    for path in made.glob("table-10.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "table-10.json").read_text())
    arguments = ["10", "--output", str(tmp_path), *SMALL, *TASK, "--rows", "mosa"]
    more = {**record, "rows": {**record["rows"], "more": next(iter(record["rows"].values()))}}
    for kept, lost in (
        ({**record, "seeds": 3}, "3 seeds"),
        ({**record, "quick": False}, "runs of full length"),
        (more, "more, digits, 10 labels a class"),
    ):
        (tmp_path / "table-10.json").write_text(json.dumps(kept))
        result = run(*arguments)
        assert result.exit_code == 1
        assert f"table-10.json holds figures that would be lost ({lost})" in " ".join(result.output.split())
        assert json.loads((tmp_path / "table-10.json").read_text()) == kept
        assert not (tmp_path / "cells").exists()
    (tmp_path / "table-10.json").write_text('{"mine": 1}')
    assert "table-10.json is there and is not a table" in run(*arguments).output
    assert run(*arguments, "--plan").exit_code == 0


def test_a_cells_identity_is_what_decides_its_numbers() -> None:
    first, second = small_cells(2)
    assert first.identity != second.identity
    relabelled = Cell("other words", first.settings, first.test)
    assert relabelled.identity == first.identity
    assert Cell(first.label, first.settings, not first.test).identity != first.identity


def test_plan_runs_nothing(tmp_path: Path) -> None:
    result = run("all", "--output", str(tmp_path / "none"), "--plan")
    assert result.exit_code == 0, result.output
    assert "left out" not in result.output
    assert "14 table(s)" in result.output
    assert "0 of the 576 are done" in result.output
    assert not (tmp_path / "none").exists()


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    result = run("9", "--output", str(tmp_path), "--tasks", "digits")
    assert result.exit_code == 1
    assert "tasks: expected some of digits, 10 labels a class; " in result.output
    result = run("9", "--output", str(tmp_path), "--rows", "mosa,mosq")
    assert "got mosq" in result.output
    result = run("2", "--output", str(tmp_path), "--vtab", str(tmp_path))
    assert result.exit_code == 1
    assert result.output.count("which does not exist") == 19


def test_one_recipe_wants_several_tasks_that_choose() -> None:
    assert "0 of the 16 are done" in plan("9", "--rows", "mosa", "--one-recipe").output
    result = plan("9", "--one-recipe", *TASK)
    assert result.exit_code == 1
    assert (
        "--one-recipe: expected tables of which several tasks choose, got table 9, where 'digits, 10 labels a class' "
        in (result.output)
    )


def test_a_large_table_leaves_out_tasks_that_can_be_asked_for() -> None:
    assert [task.name for task in read_table("14").tasks] == ["digits, 20 labels a class"]
    assert {task.name for task in read_table("14", every_task=True).tasks} > {"count"}
    usual = plan("14", "--rows", "pfeiffer")
    assert "0 of the 8 are done" in usual.output, usual.output
    asked = plan("14", "--rows", "pfeiffer", "--tasks", "digits, 20 labels a class; count")
    assert "0 of the 16 are done" in asked.output, asked.output


def test_the_papers_means_are_of_the_tasks_that_ours_are_of(tmp_path: Path) -> None:
    def columns(number: str, tasks: str, root: Path | None = tmp_path) -> list[str]:
        table = restrict(read_table(number, None if root is None else str(root)), tasks, None)
        return list(table.rows[0].paper)

    every = "CUB-200-2011; NABirds; Oxford Flowers; Stanford Dogs; Stanford Cars"
    assert columns("1", every) == [*every.split("; "), "mean"]
    assert columns("1", "NABirds; Stanford Cars") == ["NABirds", "Stanford Cars"]
    (full,) = (row for row in read_table("1").rows if row.variant == "full")
    (some,) = restrict(read_table("1", str(tmp_path)), "NABirds; Stanford Cars", "full").rows
    assert printed_mean(some) == pytest.approx((full.paper["NABirds"] + full.paper["Stanford Cars"]) / 2)
    assert columns("2", "SVHN; Patch Camelyon; EuroSAT; Resisc45; Retinopathy") == ["specialized"]
    assert columns("6", "NABirds") == []
    assert columns("1", "digits, 10 labels a class", None) == [*every.split("; "), "mean"]  # for orientation


def plan(*arguments: str) -> Any:
    return run(*arguments, "--output", "never-written", "--plan")


def test_folders_of_data_are_taken_as_meant_or_refused(tmp_path: Path) -> None:
    result = plan("1", "--vtab", str(tmp_path))
    assert result.exit_code == 1
    assert f"--vtab: table 1 needs --fgvc, got --vtab {tmp_path}" in result.output
    result = plan("ours-4", "--fgvc", str(tmp_path))
    assert "--fgvc: table ours-4 needs offline tasks only" in result.output
    result = plan("1", "--fgvc", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "--fgvc: expected a folder, got" in result.output
    result = plan("all", "--rows", "foo")
    assert result.exit_code == 1
    assert "no table is left: rows: expected some of full, linear" in result.output
    result = plan("all", "--fgvc", str(tmp_path))
    assert result.exit_code == 0, result.output
    whole = "".join(result.output.split("\n"))
    assert f"table 1, 4, 5, 6, 7, 8, 9, 10, 13, 14, figure-3: the paper's data sets in {tmp_path}" in whole
    assert "table 2, 3, 15: offline tasks in place of the paper's data sets" in whole


def write_vtab(folder: Path) -> None:
    """The lists of VTAB-1k over two images a split."""
    (folder / "images").mkdir(parents=True)
    lines: dict[str, list[str]] = {}
    for split in ("train", "val", "test"):
        for label in range(2):
            Image.new("RGB", (8, 8), (label * 9, 0, 0)).save(folder / "images" / f"{split}{label}.png")
            lines.setdefault(split, []).append(f"images/{split}{label}.png {label}")
    lists = {"train800": ["train"], "val200": ["val"], "train800val200": ["train", "val"], "test": ["test"]}
    for name, splits in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(line for split in splits for line in lines[split]))


def test_a_folder_of_data_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vtab(tmp_path / "vt" / "svhn_cropped")  # by another name in use
    monkeypatch.chdir(tmp_path)
    ran: list[Cell] = []
    monkeypatch.setattr("mosa_kernels.cli.table.watch", lambda grids, *_: ran.extend(grids[0].all_tuning_cells()))
    monkeypatch.setattr("mosa_kernels.cli.table.write_table", lambda *_: None)
    result = run("2", "--output", "out", "--vtab", "vt", "--tasks", "SVHN", "--rows", "mosa")
    assert result.exit_code == 0, result.output
    assert {cell.settings.data for cell in ran} == {f"vtab:{tmp_path}/vt/svhn_cropped"}
    splits = table_cells.open_splits(ran[0].settings, 8)
    assert len(splits.train) == 2


def test_runs_follow_data_that_were_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vtab(tmp_path / "vt" / "svhn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sources, "weights", lambda *_: "the same")
    left: list[Cell] = []

    def watch(grids: list[Grid], folder: Path, *_: Any) -> None:
        left[:] = missing_cells(grids[0].all_tuning_cells(), folder)

    monkeypatch.setattr("mosa_kernels.cli.table.watch", watch)
    monkeypatch.setattr("mosa_kernels.cli.table.write_table", lambda *_: None)
    words = ("2", "--output", "out", "--tasks", "SVHN", "--rows", "mosa", "--vtab")
    assert run(*words, "vt").exit_code == 0
    whole, cells = len(left), tmp_path / "out" / "cells"
    for cell in left[:3]:
        record = {"settings": cell.settings.as_dict(), "on": "validation", "mechanisms": ["merged"], "measured": {}}
        sources = {"data": {"fingerprint": Sources().fingerprint(cell.settings)}, "backbone": {"sha256": "the same"}}
        write_json(cell.path(cells), {**record, **sources})
    shutil.move("vt", "moved")
    assert f"3 of the {whole} are done" in run(*words, "moved", "--plan").output
    assert len(list(cells.iterdir())) == 3
    result = run(*words, "moved")
    assert result.exit_code == 0, result.output
    assert "3 run(s) of the same data and weights, which lay elsewhere, are taken over" in result.output
    assert len(left) == whole - 3
    assert "taken over" not in run(*words, "moved").output


def test_one_checkpoint_is_not_given_to_several_backbones(tmp_path: Path) -> None:
    result = plan("all", "--checkpoint", "B.npz", "--fgvc", str(tmp_path))
    assert result.exit_code == 1
    assert "--checkpoint: expected tables of one backbone, got vit_base_patch16_224.orig_in21k (table 1, 5" in (
        result.output
    )
    assert "vit_large_patch16_224.orig_in21k (table 4); " in result.output
    assert "give the tables one by one" in result.output
    assert plan("1", "--checkpoint", "B.npz", "--fgvc", str(tmp_path)).exit_code == 0


def test_weights_that_are_not_there_leave_nothing_behind(tmp_path: Path) -> None:
    words = (*SMALL, *TASK, "--rows", "mosa", "--checkpoint", str(tmp_path / "B.npz"))
    with mock.patch.object(Sources, "fingerprint", side_effect=AssertionError("data are opened")):
        result = run("10", "--output", str(tmp_path / "out"), *words)
    assert result.exit_code == 1
    assert f"error: checkpoint: no file {tmp_path / 'B.npz'}" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_what_is_called_quick_is() -> None:
    result = plan("9", "--quick", "--epochs", "100")
    assert result.exit_code == 1
    assert "quick: expected at most 2 epochs beside it, got --epochs 100" in result.output
    assert plan("9", "--quick", "--epochs", "2").exit_code == 0


def test_augmentation_and_weight_decay_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Cell] = []
    monkeypatch.setattr("mosa_kernels.cli.table.watch", lambda grids, *_: ran.extend(grids[0].all_tuning_cells()))
    monkeypatch.setattr("mosa_kernels.cli.table.write_table", lambda *_: None)
    given = ("--augment", "light", "--weight-decay", "0.01,0")
    for options in ((), given, (*given, "--quick")):
        result = run("9", "--output", str(tmp_path), "--rows", "mosa", *options)
        assert result.exit_code == 0, result.output
    plain, both, quick = ran[: len(ran) // 5], ran[len(ran) // 5 : 3 * len(ran) // 5], ran[3 * len(ran) // 5 :]
    assert {cell.settings.recipe.augment for cell in plain} == {"none"}
    assert {(c.settings.recipe.augment, c.settings.recipe.weight_decay) for c in both} == {
        ("light", 0.01),
        ("light", 0),
    }
    assert {cell.settings.recipe.epochs for cell in quick} == {2}
    assert {cell.settings.recipe.augment for cell in quick} == {"light"}
    assert not {cell.identity for cell in plain} & {cell.identity for cell in both}
    assert (
        "weight_decay: expected numbers separated by commas, got 'much'" in plan("9", "--weight-decay", "much").output
    )
    assert "weight_decay: expected a finite number of at least 0" in plan("9", "--weight-decay", "-1").output
    assert "augment: expected one of none, light" in plan("9", "--augment", "heavy").output
