"""Writes the README's figures from the committed reports; with --check, says whether they are up to date.

python scripts/update_readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DEMO = ROOT / "benchmarks" / "accuracy" / "demo.json"
CPU = ROOT / "benchmarks" / "reports" / "adapter_cpu.md"


def demo_section() -> str:
    """The demo's tables, what they say, and where and how they were made."""
    record = json.loads(DEMO.read_text())
    return "\n\n".join(
        [
            "![Sample images, accuracies and training curves](docs/demo.png)",
            record["markdown"].strip(),
            f"`make demo` on {record['machine']}: {record['seconds']:.0f} s. Mean and standard deviation over seeds "
            f"{', '.join(map(str, record['seeds']))}; learning rates and dropout were chosen beforehand on "
            "validation data of other seeds; `mosa_kernels/assets/demo_settings.json` lists what was tried, and how "
            "the settings came about. Stored: what inference needs once the adapters are merged. The ranking holds for "
            "this recipe on this small backbone and says nothing about larger ones.",
        ]
    )


def cpu_section() -> str:
    """The report of benchmarks/bench_adapter.py as it stands."""
    return CPU.read_text().strip()


SECTIONS = {"demo": demo_section, "cpu": cpu_section}


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
