"""What the README shows runs as written, and its figures are those of the committed reports."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from reports import ms, record, report, row
from script_modules import load_script
from typer.testing import CliRunner

import mosa_kernels as mk
from mosa_kernels.cli.main import app
from mosa_kernels.train.folder import write_json

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(page for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md") for page in ROOT.glob(pattern))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
COMMANDS = [line.split("#")[0].strip() for line in SHELL if line.startswith("mosa-kernels")]
SETTINGS = re.findall(r"`(MoSAConfig\(.*?\))`", README)
OPTIONS = re.findall(r"`(--.*?)`", README.partition("## Which settings to use")[2].partition("\n## ")[0])


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run_as_written(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "save_adapter" in code:
        assert sorted(path.name for path in (tmp_path / "my-adapter").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_have_the_options_shown(line: str) -> None:
    _, command, *arguments = shlex.split(line)
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert shown.exit_code == 0, shown.output
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in shown.output


@pytest.mark.parametrize("code", SETTINGS)
def test_settings_are_settings(code: str) -> None:
    eval(code, {"MoSAConfig": mk.MoSAConfig})


@pytest.mark.parametrize("line", OPTIONS)
def test_settings_are_options_of_train(line: str, tmp_path: Path) -> None:
    refused = ["train", *shlex.split(line), "--data", "offline:nothing", "--output", str(tmp_path / "run")]
    output = CliRunner().invoke(app, refused).output
    assert "got 'nothing'" in output, output  # for the data alone: every option was taken


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading: lower case, without punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            name, _, section = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), target
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if section else []
            assert not section or section in map(_anchor, headings), target


def test_figures_are_those_of_the_reports() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "update_readme.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_gpu_columns_come_from_reports_and_missing_ones_say_how_to_fill_them(tmp_path: Path) -> None:
    reports = tmp_path / "benchmarks" / "reports"
    rows = [
        row("eager", 0.4), row("compile max-autotune", 0.2), row("triton", 0.1, True, copy_share=0.87),
        row("cuda", 0.15, True, copy_share=0.5),
    ]  # fmt: skip
    write_json(reports / "h200" / "report.json", report(record("adapter_forward", rows)))
    write_json(reports / "a_cpu" / "report.json", report(device="some CPU"))
    section = load_script("scripts/update_readme.py").gpu_section(reports)
    assert "|  | H200 | A100 | V100 |" in section
    line = "| ViT-B, forward | triton 0.1 ms, 4.0x eager, 2.0x compiled, 87% | not measured | not measured |"
    assert line in section
    assert "| ViT-L, forward | not measured | not measured | not measured |" in section
    assert "open a pull request" in section
    write_json(reports / "a100" / "report.json", report(device="NVIDIA A100-SXM4-80GB"))
    assert "|  | A100-SXM4-80GB | H200 | V100 |" in load_script("scripts/update_readme.py").gpu_section(reports)


def test_the_readme_says_whether_a_gpu_has_run_the_kernels(tmp_path: Path) -> None:
    module = load_script("scripts/update_readme.py")
    assert "no GPU has run these kernels" in module.gpu_state(tmp_path)
    assert module.gpu_state(tmp_path) in README or module.gpu_reports(module.REPORTS)
    write_json(tmp_path / "h200" / "report.json", report())
    assert module.gpu_state(tmp_path).startswith("Measured on H200.")
    assert "no GPU" not in module.gpu_state(tmp_path)


@pytest.mark.parametrize(
    ("device", "columns"),
    [
        ("NVIDIA RTX A1000", "RTX A1000 | A100 | V100"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB | V100"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe | V100"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "A100-SXM4-80GB MIG 1g.10gb | A100 | V100"),
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-16GB | A100"),
        ("Tesla V100S-PCIE-32GB", "Tesla V100S-PCIE-32GB | A100 | V100"),
    ],
)
def test_a_column_is_filled_by_that_gpu_alone(device: str, columns: str, tmp_path: Path) -> None:
    reports = tmp_path / "benchmarks" / "reports"
    write_json(reports / "one" / "report.json", report(device=device, device_type="cuda"))
    assert f"|  | {columns} |" in load_script("scripts/update_readme.py").gpu_section(reports)


def test_of_two_reports_of_a_gpu_the_newer_counts_and_that_is_said(tmp_path: Path) -> None:
    reports = tmp_path / "benchmarks" / "reports"
    for name, median, made in (("a", 0.1, "2026-05-01T00:00:00+00:00"), ("b", 0.2, "2026-04-01T00:00:00+00:00")):
        rows = [row("eager", 0.4), row("triton", median, True)]
        write_json(reports / name / "report.json", report(record("adapter_forward", rows), made=made))
    section = load_script("scripts/update_readme.py").gpu_section(reports)
    assert "| ViT-B, forward | triton 0.1 ms, 4.0x eager |" in section
    assert "H200: the newest of 2 reports, of 2026-05-01" in section


def test_the_cpu_table_comes_from_its_report(tmp_path: Path) -> None:
    rows = [row("eager", 10.0), row("cpu", 4.0, True)]
    red = {"provider": "cpu", "ours": True, "status": "red", "reason": "error gate red"}
    made = report(
        record("adapter_forward", rows, shape="vit_b, 64 x 197", dtype="fp32"),
        record("adapter", [rows[0], red]),
        record("merge", rows),
        device="a CPU",
    )
    write_json(tmp_path / "cpu" / "report.json", made)
    section = load_script("scripts/update_readme.py").cpu_section(tmp_path)
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    expected = "| 64 x 197, d 768, r 64 | fp32 | call | forward | 4.00 (3.60) | 10.00 (9.00) | 2.50 (2.50) |"
    assert lines[2:] == [expected]  # what is red has no line


def test_what_the_cpu_reports_miss_and_what_changed_since_is_said(tmp_path: Path) -> None:
    module = load_script("scripts/update_readme.py")
    case = {"shape": "vit_b, 64 x 197"}
    slow, fast = [row("eager", 10.0), row("cpu", 8.0, True)], [row("eager", 10.0), row("cpu", 2.0, True)]
    made = report(record("adapter_forward", slow, **case), record("adapter", fast, **case), device="a CPU")
    write_json(tmp_path / "cpu" / "report.json", made)
    section = module.cpu_section(tmp_path)
    assert "this report misses 1 of 2 in bf16 (forward, expert per call: 1.25 of 2.5);" in section
    assert "that of another CPU not measured." in section
    assert "Made at commit abc." in section
    old = next(iter(module.CHANGED_SINCE))
    write_json(tmp_path / "cpu" / "report.json", {**made, "machine": {**made["machine"], "commit": old}})
    assert f"Made at commit {old[:7]}; the CPU kernels have changed since" in module.cpu_section(tmp_path)


def test_the_table_of_whole_models_comes_from_its_report(tmp_path: Path) -> None:
    def variant(name: str, median: float | None) -> dict:
        return {"variant": name, "status": "ok"} | ({} if median is None else {"ms": {"median": median}})

    made = report(device="a CPU")
    for name, alone, adapted in (("vit", 2000.0, 2100.0), ("swin", 1000.0, None)):
        case = {"model": name, "batch": 4, "r": 64, "N": 4, "precision": "fp32"}
        training = [variant("backbone alone", alone), variant("MoSA cpu", adapted)]
        inference = [variant("no adapters", 500.0), variant("merged", 495.0)]
        made["models"].append({"case": case, "training": training, "inference": inference})
    write_json(tmp_path / "cpu_models" / "report.json", made)
    section = load_script("scripts/update_readme.py").models_section(tmp_path)
    assert [line for line in section.splitlines() if line.startswith("| ") and "---" not in line] == [
        "| training step | vit | swin |",
        "| backbone alone | 2.00 | 1.00 |",
        "| MoSA cpu | 2.10 (+5.0%) | not measured |",
        "| inference | vit | swin |",
        "| no adapters | 0.50 | 0.50 |",
        "| merged | 0.49 (-1.0%) | 0.49 (-1.0%) |",
    ]
    assert "Seconds, the median of runs in turn, for 4 images in fp32, r = 64, N = 4;" in section


@pytest.mark.parametrize(("merged", "verdict"), [(520.0, "overlap: this report does not"), (560.0, "do not overlap.")])
def test_the_largest_difference_in_inference_stands_beside_its_spread(
    merged: float, verdict: str, tmp_path: Path
) -> None:
    medians = {"no adapters": 500.0, "unmerged, cpu": 505.0, "merged": merged}
    inference = [{"variant": name, "ms": ms(median, 0.03)} for name, median in medians.items()]
    made = report(device="a CPU")
    case = {"model": "swin", "batch": 4, "r": 64, "N": 4, "precision": "fp32"}
    made["models"].append({"case": case, "training": [{"variant": "backbone alone"}], "inference": inference})
    write_json(tmp_path / "cpu_models" / "report.json", made)
    section = load_script("scripts/update_readme.py").models_section(tmp_path)
    assert f"The largest in inference is {merged / 500 - 1:+.1%}, for merged swin; the two spreads (" in section
    assert verdict in section


def test_the_range_of_ratios_takes_every_row_of_the_same_call(tmp_path: Path) -> None:
    case = {"shape": "vit_b, 64 x 197"}
    again = [row("eager", 6.0), row("cpu, element", 4.0, True), row("cpu, column", 1.0, True)]
    kept = report(
        record("adapter_forward", [row("eager", 10.0), row("cpu", 4.0, True)], **case),
        record("granularity", again, **case, **{"pass": "forward"}),
        record("adapter_forward", [row("eager", 30.0), row("cpu", 4.0, True)], shape="vit_b, 1 x 197"),
        device="a CPU", allocator="one that keeps memory",
    )  # fmt: skip
    write_json(tmp_path / "cpu" / "report.json", kept)
    section = load_script("scripts/update_readme.py").cpu_section(tmp_path)
    assert "in fp32, not measured, in bf16, forward 1.5 to 2.5; the allocator is one that keeps memory" in section
