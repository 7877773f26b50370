"""CoRSA on Ray: edit the facts in language models repeatedly, and measure what each round does to earlier edits.

Nguyen et al. 2026, arXiv 2602.03696. The method is in `corsa.algorithm`, one idea per file; the step of Algorithm 1 is
`corsa.algorithm.step.corsa_step`. Python API: `load_edits`, `edit`, `evaluate`, `merge`, `to_dataset`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corsa.api import edit, evaluate, load_edits, to_dataset
    from corsa.editing.merging import merge

__all__ = ["edit", "evaluate", "load_edits", "merge", "to_dataset"]

_WHERE = {"merge": "corsa.editing.merging"}


def __getattr__(name: str) -> Any:
    # Names are imported on first use, so that `import corsa` loads neither torch nor ray.
    if name not in __all__:
        raise AttributeError(f"module 'corsa' has no attribute {name!r}")
    return getattr(import_module(_WHERE.get(name, "corsa.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
