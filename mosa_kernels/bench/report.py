"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mosa_kernels.bench.case import DENSE_COPIES
from mosa_kernels.bench.goals import answers
from mosa_kernels.bench.records import DISTURBED, Record, comparable, disturbed, failures, is_slower, losses, name_of

NOTHING = "-"
HOW_TO_SEND = (
    "Another device: run `mosa-kernels bench --preset full --output benchmarks/reports/NAME` in a clone (on a GPU, "
    "`benchmarks/gpu.sh OUT` runs the tests and compute-sanitizer too) and open a pull request with the folder."
)
_SECTIONS = {
    "adapter_forward": "Adapter, forward",
    "adapter_backward": "Adapter, backward",
    "adapter": "Adapter, forward + backward",
    "merge": "Merge of all adapters of a model",
    "masked_adamw": "Optimizer step on all adapters of a model",
    "alignment": "Alignment loss over half the blocks, forward + backward",
    "granularity": "What experts own: random entries, blocks, rows or whole units (columns)",
}
_EXPLANATION = """Median milliseconds with the 20th and 80th percentile; all providers of a case ran in turn. *limit*:
the share of what the device was measured to do, counting the least bytes and products that any implementation needs.
*bytes*: what the provider itself moves, counted by formula; *copy*: these over its time and the measured copy
bandwidth; *products*: its matrix products over its time and what the device was measured to do in that type or in
fp32, whichever is more. *x base*: how many times as fast as the row named there. *error*: the output or gradient
furthest off, against float64, relative root mean square, and eager PyTorch's beside it; a provider further off than
twice eager plus 1e-6 (8 roundings of float32) has no time. *saved*: kept for the backward pass beyond inputs and
weights. A warm cache is one that holds the whole call: memory is no limit there. In bold: the fastest that computes
the same."""

_LOWEST = f"""*Lowest*: this report times such a call more than once, and the worst of its ratios is held to the goal;
the others are under "{_SECTIONS["adapter_forward"]}", "{_SECTIONS["adapter"]}" and "{_SECTIONS["granularity"]}"."""
_GROWING = {"bottleneck r": "r", "experts N": "N", "adapters": "layers"}  # axis: what a case calls it
_GROWTH = """Median milliseconds, in bold where ours is slower than another. *saved*: kept for the backward pass;
*trained state*: weights, gradients, moments and owners or masks, the same for all providers but N copies."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text."""
    rule = ["---" if number < left else "---:" for number in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def milliseconds(row: Record, fastest: bool = False) -> str:
    """Median and spread, or why there is none."""
    if "ms" not in row:
        return str(row["reason"]) if row["status"] == "red" else f"{row['status']}: {row['reason']}"
    ms = row["ms"]
    median = _number(ms["median"])
    return f"{f'**{median}**' if fastest else median} ({_number(ms['p20'])} to {_number(ms['p80'])})"


def markdown(report: Record, pictures: Sequence[str] = ()) -> str:
    """The whole report."""
    parts = [f"# {report['machine']['device']}", machine_lines(report), limits_line(report)]
    parts += disturbed_lines(report)
    wrong = failures(report)
    if wrong:
        parts.append("**Wrong or failed:**\n\n" + "\n".join(f"- {line}" for line in wrong))
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    parts += [goals_section(report)] if answers(report) else []
    if any(report.get(part) for part in ("kernels", "growth", "models")):
        slower = losses(report)
        lines = "\n".join(f"- {line}" for line in slower) if slower else "Nowhere in this report."
        parts.append(f"## Where the fused backends lose\n\n{lines}")
        parts.append("## Kernels\n\n" + _EXPLANATION)
    for operator, title in _SECTIONS.items():
        records = [record for record in report.get("kernels", []) if record["operator"] == operator]
        if records:
            parts.append(f"### {title}\n\n" + "\n\n".join(map(kernel_section, records)))
            missing = not_available(row for record in records for row in record["rows"])
            parts += [f"Not available: {missing}"] if missing else []
    if report.get("models"):
        parts.append("## Whole models\n\n" + "\n\n".join(map(model_section, report["models"])))
    if report.get("growth"):
        parts.append("## How cost grows, forward + backward\n\n" + growth_section(report["growth"]))
    if report.get("left_out"):
        parts.append("## Left out for lack of time\n\n" + "\n".join(f"- {name}" for name in report["left_out"]))
    parts.append(HOW_TO_SEND)
    return "\n\n".join(parts) + "\n"


def machine_lines(report: Record) -> str:
    """Where and with what it was measured."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    lines = [
        f"- {report['preset']} preset, {report['seconds']:.0f} s, {machine['made']}, commit {machine['commit'] or '?'}",
        f"- {machine['cpu']}, {machine['threads']} threads, {machine['cpu_capability']}; compiled kernels for the "
        f"CPU: {machine['compiled_cpu_kernels']}; for CUDA: {machine['compiled_cuda_kernels']}",
        f"- {versions}",
    ]
    if machine.get("allocator"):
        lines.append(f"- allocator, for all providers alike: {machine['allocator']}")
    if machine["gpu"]:
        lines.append("- " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine["gpu"].items()))
    return "\n".join(lines)


def limits_line(report: Record) -> str:
    """What the device was seen to do, and what its maker says."""
    limits = report["limits"]
    matrix = ", ".join(f"{rate:.3g} in {name}" for name, rate in limits["matrix"].items())
    text = f"Measured limits: copying {limits['copy']:.4g} GB/s (read + written), matrix products {matrix} TFLOP/s."
    known = limits["known"]
    if known:
        text += (
            f" The maker's: {known['bandwidth']:g} GB/s"
            + (f", {known['half']:g} TFLOP/s in 16 bits" if known["half"] else "")
            + f" ({known['source']}); copying reaches {limits['copy'] / known['bandwidth']:.0%} of it."
        )
    return text


def disturbed_lines(report: Record) -> list[str]:
    """How much of a report the machine's other work may have spoiled, in one line, or none."""
    cases = [record for part in ("kernels", "models", "growth") for record in report.get(part, [])]
    count = sum(bool(disturbed(record)) for record in cases)
    line = (
        f"{count} of {len(cases)} cases were disturbed: some provider's 80th percentile is more than {DISTURBED} times "
        "its 20th, since the machine had other work, say. Their figures may be wrong; measure again when it has none."
    )
    return [line] if count else []


def goals_section(report: Record) -> str:
    rows = [
        (
            answer.case,
            answer.backend,
            answer.goal.name,
            f"{'at most' if answer.goal.at_most else 'at least'} {answer.goal.must:g}{answer.goal.unit}",
            answer.shown,
            answer.verdict,
        )
        for answer in answers(report)
    ]
    parts = ["## Goals", table(("case", "backend", "figure", "goal", "measured", ""), rows, left=3)]
    if any(answer.among > 1 for answer in answers(report)):
        parts.append(_LOWEST)
    return "\n\n".join(parts)


def kernel_section(record: Record) -> str:
    """One case: its limit, and a line for each provider."""
    floor = record["floor"]
    title = (
        f"**{name_of(record['case'])}** ({record['cache']} cache; at least {_bytes(floor['bytes'])} and "
        f"{floor['flops'] / 1e9:.3g} GFLOP: {_number(floor['ms'])} ms, bound by {floor['bound']})"
    )
    head = [
        *("provider", "ms", "x eager", "x base", "limit", "bytes", "copy", "products"),
        *("saved", "peak", "launches", "host us", "error (eager)"),
    ]
    rivals = [row for row in record["rows"] if "ms" in row and comparable(row)]
    best = min(rivals, key=lambda row: row["ms"]["median"], default=None)
    rows = [
        (
            row["provider"],
            milliseconds(row, row is best),
            _cell(row, "speed_up", "{:.2f}".format),
            f"{row['gain']:.2f} ({row['base']})" if "gain" in row else NOTHING,
            _cell(row, "share_of_limit", "{:.0%}".format),
            _cell(row, "bytes", _bytes),
            _cell(row, "copy_share", "{:.0%}".format),
            _cell(row, "matrix_share", "{:.0%}".format),
            _cell(row, "saved_bytes", _bytes),
            _cell(row, "peak_bytes", _bytes),
            _cell(row, "launches", str),
            _cell(row, "host_us", lambda cost: f"{cost['host']:.0f}"),
            _cell(row, "error", lambda e: f"{e['worst']} {e['relative']:.1e} ({e['eager']:.1e})"),
        )
        for row in record["rows"]
        if row["status"] != "unavailable"
    ]
    kept = _kept_columns(rows)
    notes = [f"{row['provider']}: {row['note']}" for row in record["rows"] if "note" in row]
    notes += [f"Disturbed: {', '.join(disturbed(record))}."] if disturbed(record) else []
    return "\n\n".join([title, table([head[n] for n in kept], [[row[n] for n in kept] for row in rows]), *notes])


def not_available(rows: Iterable[Record]) -> str:
    """The providers without figures, each with its reasons, once."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] == "unavailable":
            reason = str(row["reason"])
            reasons.setdefault(row.get("provider") or row["variant"], {})[
                reason.rpartition("does not take this call: ")[2]
            ] = None
    return "; ".join(f"{provider} ({', or '.join(found)})" for provider, found in reasons.items()) + "." * bool(reasons)


def model_section(record: Record) -> str:
    """Training and inference of one model."""
    head = ("training step, two passes", "ms", "images/s", "in adapters", "saved", "peak", "trained state")
    rows = [
        (
            row["variant"],
            milliseconds(row),
            _cell(row, "images_per_second", "{:.1f}".format),
            _cell(row, "share_in_adapters", "{:.0%}".format),
            _cell(row, "saved_bytes", _bytes),
            _cell(row, "peak_bytes", _bytes),
            _cell(row, "state_bytes", _bytes),
        )
        for row in record["training"]
        if row["status"] != "unavailable"
    ]
    kept = _kept_columns(rows)
    training = table([head[n] for n in kept], [[row[n] for n in kept] for row in rows])
    titles = ("inference", "ms", "images/s", "peak")
    lines = [
        (
            row["variant"],
            milliseconds(row),
            _cell(row, "images_per_second", "{:.1f}".format),
            _cell(row, "peak_bytes", _bytes),
        )
        for row in record["inference"]
    ]
    kept = _kept_columns(lines)
    inference = table([titles[n] for n in kept], [[line[n] for n in kept] for line in lines])
    missing = not_available([*record["training"], *record["inference"]])
    parts = [f"**{name_of(record['case'])}**", training, *([f"Not available: {missing}"] if missing else []), inference]
    parts += [f"Disturbed: {', '.join(disturbed(record))}."] if disturbed(record) else []
    return "\n\n".join(parts)


def growth_section(records: Sequence[Record]) -> str:
    """For each axis a table of medians, of what is saved, and of what training keeps."""
    axes = list(dict.fromkeys(record["axis"] for record in records))
    return (
        _GROWTH
        + "\n\n"
        + "\n\n".join(_growth_of(axis, [record for record in records if record["axis"] == axis]) for axis in axes)
    )


def _growth_of(axis: str, records: Sequence[Record]) -> str:
    timed = {row["provider"] for record in records for row in record["rows"] if "ms" in row}
    names = [row["provider"] for row in records[0]["rows"] if comparable(row) and row["provider"] in timed]
    states = [name for name in dict.fromkeys((*names[:1], DENSE_COPIES)) if name in names]
    head = [axis, *(f"{name}, ms" for name in names), *(f"{name}, saved" for name in names)]
    head += [f"{name}, trained state" for name in states]
    rows = []
    for record in records:
        by_name = {row["provider"]: row for row in record["rows"]}
        times = [_growth_time(by_name[n], record["rows"]) for n in names]
        saved = [_cell(by_name[n], "saved_bytes", _bytes) for n in names]
        rows.append([str(record["value"]), *times, *saved, *(_cell(by_name[n], "state_bytes", _bytes) for n in states)])
    kept = _kept_columns(rows)
    case = dict(records[0]["case"])
    if axis == "tokens":
        case["shape"] = str(case["shape"]).partition(",")[0]
    case.pop(_GROWING.get(axis, ""), None)
    lines = table([head[n] for n in kept], [[row[n] for n in kept] for row in rows])
    spoiled = [f"{record['value']} ({', '.join(disturbed(record))})" for record in records if disturbed(record)]
    parts = [f"Against {axis}: {name_of(case)}", lines, *([f"Disturbed: {', '.join(spoiled)}."] if spoiled else [])]
    return "\n\n".join(parts)


def _growth_time(row: Record, rows: list[Record]) -> str:
    """In bold where it is ours and another is faster."""
    if "ms" not in row:
        return NOTHING
    median = _number(row["ms"]["median"])
    return f"**{median}**" if is_slower(row, rows) else median


def _kept_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns that say anything."""
    width = len(rows[0]) if rows else 0
    return [n for n in range(width) if n < 2 or any(row[n] != NOTHING for row in rows)]


def _cell(row: Record, name: str, spell: Callable[[Any], str]) -> str:
    value = row.get(name)
    return NOTHING if value is None else spell(value)


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
