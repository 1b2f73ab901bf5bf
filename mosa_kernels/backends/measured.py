"""Which backend is the fastest for a call, as `mosa-kernels bench --choose` measured it on this device.

The nearest measured cell decides: of the operator's cells in exactly this dtype, those whose sizes (all but the last)
are nearest to the call's, and of these the one whose last size is nearest. Near means by the ratio: the distance is
that of the logarithms, summed over the sizes; of two as near the larger one. The answer is every backend that beat
the definition there, the fastest first, in case that one does not take the call.

A table is read when a device is first asked for, and not again: the user's own, else one that came with the package.
The user's is used where device, package and PyTorch (but for its patch version) are those that it was measured with;
those of the package are held to the device alone, since whoever ships them vouches for them.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from bisect import bisect
from collections.abc import Iterable
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mosa_kernels._machine import machine
from mosa_kernels.version import __version__

FORMAT = 1
"""Of the tables; another one is not read."""

REFERENCE = "reference"
SHIPPED = Path(__file__).parents[1] / "assets" / "choice"
SIZES = {
    "adapter_forward": ("d", "r", "tokens"),  # without gradients
    "adapter": ("d", "r", "tokens"),  # forward and backward
    "merge": ("d", "r", "adapters"),
    "masked_adamw": ("tensors", "entries"),
    "feature_alignment": ("layers", "entries"),  # entries of a layer
    "consistency": ("classes", "batch"),
    "split": ("entries",),
}
"""The sizes of each operator's cells. A compiled graph serves every value of the last one, and takes the largest."""

ADVICE = (
    "`mosa-kernels bench --choose` measures once, in minutes, where the fused kernels are faster than the PyTorch "
    "definitions on this device, and there they run from then on; MOSA_CUDA_BACKENDS=triton,cuda (in Python: "
    'mk.prefer_backends("cuda", "triton", "cuda")) runs them unmeasured'
)

Kind = tuple[Any, ...]
"""What of a call a table is asked by: a key of SIZES, the device, the dtype (of an adapter's matrix products), and the
sizes one by one. A plain tuple: it is made for every call, and a named one takes 0.4 us more."""


class Column(NamedTuple):
    """Cells that differ in the last size alone."""

    bounds: list[float]  # between one measured size and the next
    ranked: list[tuple[str, ...]]  # what beat the definition, the fastest first

    def at(self, size: int) -> tuple[str, ...]:
        return self.ranked[bisect(self.bounds, size)]


class Table:
    """The cells of one file.

    Raises:
        KeyError, TypeError, ValueError: the record does not look like a table.
    """

    def __init__(self, file: Path, record: dict[str, Any]) -> None:
        self.file, self.record = file, record
        cells: dict[tuple[str, torch.dtype], dict[tuple[int, ...], dict[int, tuple[str, ...]]]] = {}
        if not isinstance(record["cells"], list):
            raise TypeError("its cells are no list")
        for cell in record["cells"]:
            dtype = getattr(torch, cell["dtype"])
            *fixed, last = (_positive(cell["sizes"][name]) for name in SIZES[cell["operator"]])
            times_are_numbers = all(isinstance(time, (int, float)) for time in cell["ms"].values())
            if not isinstance(dtype, torch.dtype) or not times_are_numbers:
                raise TypeError(f"no cell: {cell}")
            columns = cells.setdefault((cell["operator"], dtype), {})
            columns.setdefault(tuple(fixed), {})[last] = ranked_by_time(cell["ms"])
        self._columns = {
            group: {fixed: _column(rows) for fixed, rows in columns.items()} for group, columns in cells.items()
        }

    def column(self, name: str, dtype: torch.dtype, fixed: tuple[int, ...]) -> Column | None:
        """The nearest cells; None where there are none of this operator and dtype."""
        columns = self._columns.get((name, dtype))
        if not columns:
            return None
        return columns[min(columns, key=lambda there: (_distance(there, fixed), [-size for size in there]))]

    def summary(self) -> dict[str, str]:
        """In words, what runs each operator that was measured."""
        cells = {name: [cell for cell in self.record["cells"] if cell["operator"] == name] for name in SIZES}
        return {name: _summary(mine) for name, mine in cells.items() if mine}


def _summary(cells: list[dict[str, Any]]) -> str:
    gains: dict[str, list[float]] = {}
    for cell in cells:
        first = next(iter(ranked_by_time(cell["ms"])), REFERENCE)
        gain = cell["ms"].get(REFERENCE, math.nan) / cell["ms"].get(first, math.nan)
        gains.setdefault(first, []).append(gain)
    parts = []
    for name, mine in sorted(gains.items(), key=lambda item: -len(item[1])):
        known = [gain for gain in mine if math.isfinite(gain)]
        faster = f" ({min(known):.1f} to {max(known):.1f} times as fast)" if known and name != REFERENCE else ""
        parts.append(f"{name} in {len(mine)} of {len(cells)} measured calls{faster}")
    return ", ".join(parts)


def ranked_by_time(milliseconds: dict[str, float]) -> tuple[str, ...]:
    """The backends that are faster than the definition, the fastest first; all where that has no time."""
    limit = milliseconds.get(REFERENCE, math.inf)
    faster = [name for name, time in milliseconds.items() if name != REFERENCE and 0 < time < limit]
    return tuple(sorted(faster, key=milliseconds.__getitem__))


def _positive(size: Any) -> int:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"no size: {size!r}")
    return size


def _column(rows: dict[int, tuple[str, ...]]) -> Column:
    sizes = sorted(rows)
    bounds = [math.sqrt(low * high) for low, high in pairwise(sizes)]
    return Column(bounds, [rows[size] for size in sizes])


def _distance(there: Iterable[int], here: Iterable[int]) -> float:
    distances = (abs(math.log(a / max(b, 1))) for a, b in zip(there, here, strict=True))
    return round(sum(distances), 9)  # so that twice and half are as near


class Search(NamedTuple):
    """What was found for a device."""

    table: Table | None
    ignored: tuple[str, ...] = ()  # files that are there and not used, and why


def user_folder() -> Path:
    """Where a user's tables lie: in $MOSA_CACHE, else in mosa_kernels in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MOSA_CACHE")
    if own:
        return Path(own) / "choice"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    shared = shared if os.path.isabs(shared) else os.path.expanduser("~/.cache")
    return Path(shared) / "mosa_kernels" / "choice"


def file_name(device_name: str) -> str:
    """What the table of a device is called."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def device_name(device: torch.device) -> str:
    """What distinguishes one kind of device from another: a GPU's name, a CPU's with the cores of this process."""
    if device.type != "cuda":
        return machine()
    # Fake tensors may be on a device that is not there.
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no CUDA device"


def search(device: torch.device) -> Search:
    """Reads the table of a device, the user's before the package's."""
    folders = [folder for folder in (user_folder(), SHIPPED) if any(folder.glob("*.json"))]
    ignored: list[str] = []
    if folders:
        name = device_name(device)
        for folder in folders:
            file = folder / file_name(name)
            if not file.is_file():
                continue
            try:
                record = json.loads(file.read_text())
                reason = unfit(record, name, shipped=folder == SHIPPED)
                if reason is None:
                    return Search(Table(file, record), tuple(ignored))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"it is damaged ({type(error).__name__}: {error})"
            ignored.append(
                f"{file} is ignored: {reason}; `mosa-kernels bench --choose --device {device.type}` makes a new one"
            )
    return Search(None, tuple(ignored))


def unfit(record: dict[str, Any], name: str, shipped: bool) -> str | None:
    """Why a table does not hold for the device of this name; None: it does."""
    if record["format"] != FORMAT:
        return f"it has format {record['format']!r}, this version reads {FORMAT}"
    if record["device"] != name:
        return f"it was measured on {record['device']}, this is {name}"
    if shipped:
        return None
    made_with = record["versions"]
    if made_with["mosa_kernels"] != __version__:
        return f"it was measured with mosa_kernels {made_with['mosa_kernels']}, this is {__version__}"
    if _minor(made_with["torch"]) != _minor(torch.__version__):
        return f"it was measured with PyTorch {made_with['torch']}, this is {torch.__version__}"
    return None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


_tables: dict[tuple[str, int | None], Table | None] = {}
_columns: dict[Kind, Column | None] = {}  # by all but the last size
told = False
"""Whether somebody was told that there are kernels which do not run by themselves."""


def forget() -> None:
    """Has tables be read anew, as after one was written. What is compiled already keeps its choice."""
    global told
    told = False
    _tables.clear()
    _columns.clear()


def table_for(device: torch.device) -> Table | None:
    """The table of a device. Warns of a file that is not used, once."""
    key = (device.type, device.index)
    if key not in _tables:
        found = search(device)
        _tables[key] = found.table
        for line in found.ignored:
            warnings.warn(f"mosa_kernels: {line}", stacklevel=2)
    return _tables[key]


def ranked(kind: Kind) -> tuple[str, ...] | None:
    """What to try before the definition, the fastest first; None where nothing was measured for such a call.

    1.5 us with the making of the kind, on top of 3 us in which a backend looks whether it takes an adapter call.
    """
    alike = kind[:-1]
    if torch.compiler.is_compiling():
        return _ranked_in_graph(*alike[:3], *map(index, alike[3:]))
    try:
        column = _columns[alike]
    except (KeyError, TypeError):  # a symbolic size, as under make_fx, cannot be looked up
        alike = (*alike[:3], *map(index, alike[3:]))
        column = _columns[alike] = _column_of(*alike)
    return None if column is None else column.at(kind[-1])


def _column_of(name: str, device: torch.device, dtype: torch.dtype, *fixed: int) -> Column | None:
    table = table_for(device)
    return None if table is None else table.column(name, dtype, fixed)


@torch.compiler.assume_constant_result
def _ranked_in_graph(name: str, device: torch.device, dtype: torch.dtype, *fixed: int) -> tuple[str, ...] | None:
    """Asked in plain Python while a graph is traced, which the answer becomes part of.

    It takes constants alone: the sizes are fixed in the graph by asking for their `index`.
    """
    column = _column_of(name, device, dtype, *fixed)
    return None if column is None else column.ranked[-1]


@torch.compiler.assume_constant_result
def tell_of_idle_kernels(device: torch.device, backends: str) -> None:
    """Says once that this GPU has kernels which nobody has measured on it, and the two ways to use them."""
    global told
    if not told and table_for(device) is None:
        told = True
        warnings.warn(
            f"mosa_kernels: {device_name(device)} runs the PyTorch definitions, although there are fused kernels for "
            f'it ({backends}). {ADVICE}; mk.prefer_backends("cuda", "reference") keeps the definitions. (said once)',
            stacklevel=2,
        )
