"""Writes the README's figures from the committed reports; with --check, says whether they are up to date.

python scripts/update_readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mosa_kernels.bench.goals import Answer, answers

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DEMO = ROOT / "benchmarks" / "accuracy" / "demo.json"
REPORTS = ROOT / "benchmarks" / "reports"
CPU = "cpu"
"""The folder among the reports whose figures stand in the README; `mosa-kernels bench` writes such folders."""
CPU_ALL, CPU_OTHER = "cpu_all", "cpu_xeon"
"""The same machine's longer report, and that of another CPU."""
CPU_MODELS = "cpu_models"
"""The one whose whole models do."""

CHANGED_SINCE = {
    "932cd822738b92c9c6f0c1d34f63c2a539621de5": (
        "matrix products add up long sums in parts; on Intel's CPUs those of bf16 run in fp32"
    )
}
"""What has changed in the CPU kernels since the commit of a report in the README; to be dropped with the report."""

WANTED_GPUS = ("A100", "V100")
"""Columns that wait for somebody who has one."""

NOT_MEASURED = "not measured"
_PASSES = {"adapter_forward": "forward", "adapter": "forward + backward"}
_MODELS = {"vit_b": "ViT-B", "vit_l": "ViT-L"}

Record = dict[str, Any]


def demo_section() -> str:
    """The demo's tables, what they say, and where and how they were made."""
    record = json.loads(DEMO.read_text())
    return "\n\n".join(
        [
            "![Sample images, accuracies and training curves](docs/demo.png)",
            record["markdown"].strip(),
            f"`make demo` on {record['machine']}: {record['seconds']:.0f} s. Mean and standard deviation over seeds "
            f"{', '.join(map(str, record['seeds']))}; learning rates, scales and dropout were chosen beforehand on "
            "validation data of other seeds; `mosa_kernels/assets/demo_settings.json` lists what was tried, and how "
            "the settings came about. Stored: what inference needs once the adapters are merged. Where blocks differ "
            "in N, a fixed expert is one that all of them with several have, and so are those of the ensemble. The "
            "ranking holds for this recipe on this small backbone and says nothing about larger ones.",
        ]
    )


def ratios_of_large_calls(reports: Path, names: tuple[str, ...], dtype: str) -> str:
    """How far eager time / ours spreads over these reports: 64 images of ViT-B, r 64.

    Every row of that call counts: the part granularity times it again, where the split is of random entries.
    """
    found: dict[str, list[float]] = {}
    for path in (reports / name / "report.json" for name in names):
        for record in json.loads(path.read_text())["kernels"] if path.exists() else ():
            case, operator = record["case"], record["operator"]
            direction = case.get("pass") if operator == "granularity" else _PASSES.get(operator)
            ours, eager = timed(record, "cpu") or timed(record, "cpu, element"), timed(record, "eager")
            large = (case.get("shape"), case.get("r"), case.get("dtype")) == ("vit_b, 64 x 197", 64, dtype)
            if direction and large and ours and eager:
                ratio = eager["ms"]["median"] / ours["ms"]["median"]
                found.setdefault(direction, []).append(ratio)
    parts = [f"{name} {min(values):.1f} to {max(values):.1f}" for name, values in found.items()]
    return ", ".join(parts) or NOT_MEASURED


def goals_of(reports: Path, name: str) -> str:
    """How many of a report's goals for large calls are missed, and by which figures."""
    path = reports / name / "report.json"
    found = [a for a in answers(json.loads(path.read_text())) if a.value is not None] if path.exists() else []
    parts = []
    for dtype in ("fp32", "bf16"):
        asked = [answer for answer in found if f", {dtype}," in answer.case]
        missed = [answer for answer in asked if answer.verdict == "missed"]
        if asked:
            which = f" ({'; '.join(map(_missed, missed))})" if missed else ""
            parts.append(f"{len(missed) or 'none'} of {len(asked)} in {dtype}{which}")
    return ", ".join(parts) or NOT_MEASURED


def _missed(answer: Answer) -> str:
    operator, expert_per = answer.case.partition(",")[0], answer.case.rpartition("expert per ")[2]
    return f"{_PASSES[operator]}, expert per {expert_per}: {answer.value:.2f} of {answer.goal.must:g}"


def _as_made(machine: Record) -> str:
    changed = CHANGED_SINCE.get(machine["commit"])
    since = f"; the CPU kernels have changed since ({changed}), and were not timed on this CPU again" if changed else ""
    return f"Made at commit {machine['commit'][:7]}{since}." if machine["commit"] else "Made at an unknown commit."


def cpu_section(reports: Path = REPORTS) -> str:
    """Ours beside eager PyTorch on a CPU, forward and forward + backward."""
    report = json.loads((reports / CPU / "report.json").read_text())
    machine = report["machine"]
    rows = []
    for record in report["kernels"]:
        ours, eager = timed(record, "cpu"), timed(record, "eager")
        if record["operator"] not in _PASSES or ours is None or eager is None:
            continue
        a, b, case = ours["ms"], eager["ms"], record["case"]
        rows.append(
            (
                f"{case['shape'].rpartition(', ')[2]}, d {case['d']}, r {case['r']}",
                str(case["dtype"]),
                str(case["expert per"]),
                _PASSES[record["operator"]],
                f"{a['median']:.2f} ({a['smallest']:.2f})",
                f"{b['median']:.2f} ({b['smallest']:.2f})",
                f"{b['median'] / a['median']:.2f} ({b['smallest'] / a['smallest']:.2f})",
            )
        )
    memory = "eager PyTorch's time depends on what its allocator has at hand."
    if machine.get("allocator"):
        memory = (
            f"the allocator is {machine['allocator']}, for all alike: by default eager PyTorch's large calls may pay "
            "for new pages each time, and may take twice as long."
        )
    head = ("shape", "dtype", "expert per", "pass", "cpu ms (min)", "eager ms (min)", "ratio")
    both = (CPU, CPU_ALL)
    return "\n\n".join(
        [
            "Median milliseconds of runs in turn (the smallest in parentheses), and eager time / ours. Eager is the "
            "naive PyTorch definition with its own autograd. N = 4, LayerNorm, residual, gelu.",
            f"Machine: {machine['cpu']}, {machine['threads']} threads, PyTorch {machine['versions']['torch']} "
            f"({machine['cpu_capability']}); compiled kernels: {machine['compiled_cpu_kernels']}.",
            _as_made(machine),
            table(head, rows),
            f"Of our goals at 64 x 197 (times as fast as eager), this report misses {goals_of(reports, CPU)}; the "
            f"longer one, below, {goals_of(reports, CPU_ALL)}; that of another CPU {goals_of(reports, CPU_OTHER)}.",
            "Where ours is slower (a wide bottleneck on few tokens, whose intermediates stay in the cache), the "
            "automatic choice is eager PyTorch; the threshold and its figures are in "
            "`mosa_kernels/backends/choice.py`, and `mosa-kernels bench --choose --device cpu` puts a table measured "
            "on your machine in its place. "
            f"[This report](benchmarks/reports/{CPU}/report.md). "
            f"A [longer one](benchmarks/reports/{CPU_ALL}/report.md) sets `torch.compile`, N copies and a merged "
            "adapter beside them, and measures backward alone, merge, optimizer, alignment, whole models and how cost "
            "grows. Over all rows of the same call in both reports the "
            f"ratios at 64 x 197 are, in fp32, {ratios_of_large_calls(reports, both, 'fp32')}, in bf16, "
            f"{ratios_of_large_calls(reports, both, 'bf16')}; {memory} Where ours loses, they say so.",
            *_other_cpu(reports),
        ]
    )


def _other_cpu(reports: Path) -> list[str]:
    path = reports / CPU_OTHER / "report.json"
    if not path.exists():
        return []
    machine = json.loads(path.read_text())["machine"]
    ratios = {dtype: ratios_of_large_calls(reports, (CPU_OTHER,), dtype) for dtype in ("fp32", "bf16")}
    return [
        f"On another CPU, {machine['cpu']} without AMX ([report](benchmarks/reports/{CPU_OTHER}/report.md)), they are, "
        f"in fp32, {ratios['fp32']}, in bf16, {ratios['bf16']}: it multiplies pairs of bf16 at half the rate of fp32, "
        "so our kernels multiply in fp32 there. AMX has no kernels yet."
    ]


def models_section(reports: Path = REPORTS) -> str:
    """Whole models on a CPU: a row a variant, a column a model."""
    report = json.loads((reports / CPU_MODELS / "report.json").read_text())
    machine, models = report["machine"], report["models"]
    case = models[0]["case"]
    names = [record["case"]["model"] for record in models]
    parts = [
        f"Seconds, the median of runs in turn, for {case['batch']} images in {case['precision']}, r = {case['r']}, "
        f"N = {case['N']}; in parentheses the share by which that is more than without adapters. A training step has "
        "two passes over a frozen backbone, whose head is trained, too.",
        f"Machine: {machine['cpu']}, {machine['threads']} threads, PyTorch {machine['versions']['torch']} "
        f"({machine['cpu_capability']}).",
    ]
    for part, title in (("training", "training step"), ("inference", "inference")):
        columns = [{row["variant"]: row for row in record[part]} for record in models]
        first = next(iter(columns[0]))
        rows = [(name, *(seconds_over(column, name, first) for column in columns)) for name in columns[0]]
        parts.append(table((title, *names), rows))
    parts.append(
        f"[The report](benchmarks/reports/{CPU_MODELS}/report.md) has spreads and memory, too. On a CPU the backbone "
        "takes nearly all of a step. Differences of a few percent between adapters are often within the spread (20th "
        f"to 80th percentile).{_widest(models)}"
    )
    return "\n\n".join(parts)


def _widest(models: list[Record]) -> str:
    """The largest difference between inference with adapters and without, and whether the spreads overlap."""
    found = []
    for record in models:
        rows = [(row["variant"], row["ms"]) for row in record["inference"] if "p20" in row.get("ms", {})]
        for variant, ms in rows[1:]:
            more = ms["median"] / rows[0][1]["median"] - 1
            found.append((abs(more), more, f"{variant} {record['case']['model']}", ms, rows[0][1]))
    if not found:
        return ""
    _, more, name, one, other = max(found, key=lambda entry: entry[0])
    verdict = "do not overlap"
    if one["p20"] <= other["p80"] and other["p20"] <= one["p80"]:
        verdict = "overlap: this report does not decide it"
    ranges = " and ".join(f"{ms['p20']:.0f} to {ms['p80']:.0f}" for ms in (one, other))
    return f" The largest in inference is {more:+.1%}, for {name}; the two spreads ({ranges} ms) {verdict}."


def seconds_over(rows: dict[str, Record], name: str, first: str) -> str:
    """The median of a variant, and by how much that is above the first one's."""
    row, without = rows.get(name, {}), rows.get(first, {})
    if "ms" not in row:
        return NOT_MEASURED
    seconds = f"{row['ms']['median'] / 1e3:.2f}"
    if name == first or "ms" not in without:
        return seconds
    return f"{seconds} ({row['ms']['median'] / without['ms']['median'] - 1:+.1%})"


def gpu_reports(reports: Path) -> dict[str, tuple[Path, Record, int]]:
    """For each GPU its newest report, and how many older ones there are."""
    found: dict[str, list[tuple[str, Path, Record]]] = {}
    for path in sorted(reports.glob("*/report.json")):
        report = json.loads(path.read_text())
        machine = report["machine"]
        if machine["device_type"] == "cuda":
            name = machine["device"].removeprefix("NVIDIA ")
            found.setdefault(name, []).append((machine["made"], path, report))
    newest = {name: max(entries, key=lambda entry: entry[:2]) for name, entries in sorted(found.items())}
    return {name: (path, report, len(found[name]) - 1) for name, (_, path, report) in newest.items()}


def is_a(wanted: str, name: str) -> bool:
    """Whether a device's name, such as "A100-SXM4-80GB" or "Tesla V100-SXM2-16GB", is of a whole GPU of this kind."""
    first = name.removeprefix("Tesla ").replace("-", " ").split()[0]
    return first == wanted and "MIG" not in name.split()


def gpu_state(reports: Path = REPORTS) -> str:
    """Whether any GPU has run the kernels, and what that means for somebody who installs them."""
    found = list(gpu_reports(reports))
    if not found:
        return (
            "Not measured yet: no GPU has run these kernels so far. A fresh installation therefore runs plain PyTorch "
            "on a GPU, and says so."
        )
    return (
        f"Measured on {', '.join(found)}. On a GPU for which the package ships no table of what is the fastest, a "
        "fresh installation runs plain PyTorch, and says so."
    )


def gpu_section(reports: Path = REPORTS) -> str:
    """One column for each GPU with a report, and one for each that is wanted."""
    found = gpu_reports(reports)
    wanted = [name for name in WANTED_GPUS if not any(is_a(name, gpu) for gpu in found)]
    rows = []
    for operator, direction in _PASSES.items():
        for model, title in _MODELS.items():
            cells = [gpu_cell(report, operator, model) for _, report, _ in found.values()]
            rows.append((f"{title}, {direction}", *cells, *(NOT_MEASURED for _ in wanted)))
    parts = [
        "The fastest of the fused backends on 128 images in bf16, r = 64, N = 4, one expert a call, the cache flushed: "
        "median time, times as fast as eager PyTorch and as `torch.compile` (max-autotune), and the share of the "
        "measured copy bandwidth that its own bytes make.",
        table(("", *found, *wanted), rows),
    ]
    for name, (path, report, older) in found.items():
        date = report["machine"]["made"][:10]
        words = [f"{name}: the newest of {older + 1} reports, of {date}"] if older else []
        if (path.parent / "report.md").is_file():
            words.append(f"[{name}: the whole report]({path.parent.relative_to(reports.parents[1])}/report.md)")
        parts += words
    parts.append(
        "You have one that is missing? `benchmarks/gpu.sh benchmarks/reports/NAME` builds, tests and measures in under "
        "ten minutes; `python scripts/update_readme.py` fills in the column; "
        "`mkdir -p mosa_kernels/assets/choice && mv benchmarks/reports/NAME/choice/*.json mosa_kernels/assets/choice/` "
        "has everybody with such a GPU run what was the fastest on yours; then open a pull request."
    )
    return "\n\n".join(parts)


def gpu_cell(report: Record, operator: str, model: str) -> str:
    """What one GPU's report says of one row."""
    wanted = {"r": 64, "N": 4, "dtype": "bf16", "expert per": "call", "layers": 1}
    for record in report["kernels"]:
        case = record["case"]
        if record["operator"] != operator or not str(case.get("shape", "")).startswith(f"{model}, 128 x"):
            continue
        if any(case.get(name) != value for name, value in wanted.items()):
            continue
        ours = [row for row in record["rows"] if row["ours"] and "ms" in row]
        if not ours:
            break
        best = min(ours, key=lambda row: row["ms"]["median"])
        words = [f"{best['provider']} {best['ms']['median']:.3g} ms"]
        for provider, name in (("eager", "eager"), ("compile max-autotune", "compiled")):
            other = timed(record, provider)
            if other is not None:
                words.append(f"{other['ms']['median'] / best['ms']['median']:.1f}x {name}")
        if best.get("copy_share") is not None:
            words.append(f"{best['copy_share']:.0%}")
        return ", ".join(words)
    return NOT_MEASURED


def timed(record: Record, provider: str) -> Record | None:
    """A provider's row where it has a time."""
    return next((row for row in record["rows"] if row["provider"] == provider and "ms" in row), None)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


SECTIONS = {
    "demo": demo_section,
    "cpu": cpu_section,
    "models": models_section,
    "gpu state": gpu_state,
    "gpu": gpu_section,
}


def updated(text: str) -> str:
    """The README with every marked section written anew."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{README}: expected one section marked {name!r}, got {text.count(begin)}")
        before, rest = text.split(begin)
        text = f"{before}{begin}{section()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the figures are old")
    check = parser.parse_args().check
    text = README.read_text()
    new = updated(text)
    if check and new != text:
        sys.exit(f"{README}: the figures are not those of the reports; run scripts/update_readme.py")
    if new != text:
        README.write_text(new)


if __name__ == "__main__":
    main()
