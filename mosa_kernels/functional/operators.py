"""Every operator that several backends offer."""

from __future__ import annotations

from mosa_kernels.backends.choice import ADAPTER
from mosa_kernels.backends.lookup import Operator
from mosa_kernels.functional import alignment, consistency, masked_adamw, merge, split

OPERATORS: dict[str, Operator] = {
    "adapter_forward": ADAPTER,
    "adapter": ADAPTER,
    "merge": merge.OPERATOR,
    "masked_adamw": masked_adamw.OPERATOR,
    "feature_alignment": alignment.OPERATOR,
    "consistency": consistency.OPERATOR,
    "split": split.OPERATOR,
}
"""By the names of `backends.measured.SIZES`: the adapter is one operator with two kinds of calls."""
