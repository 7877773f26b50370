"""Detects preemption of a node that runs workers of this group (spot machines)."""

from __future__ import annotations

import time
from typing import Any


class PreemptionWatch:
    """Reports new preemption notices of Ray Train. Each worker has one, and all workers call it equally often."""

    def __init__(self) -> None:
        from ray.train import get_context

        try:
            get_context()
            self._supervised = True
        except RuntimeError:  # outside Ray Train nothing is reported
            self._supervised = False
        self._seen: Any = None

    def new_warning(self) -> str | None:
        """A sentence about a notice since the last call, the same on all workers; None if there is none.

        This is a barrier: every worker calls it after the same step.
        """
        if not self._supervised:
            return None
        from ray.train import get_preemption_info

        info = get_preemption_info()
        if info is None or info == self._seen:
            return None
        self._seen = info
        nodes = f"{len(info.preempted_node_ids)} node{'s' * (len(info.preempted_node_ids) > 1)}"
        if info.deadline_ms is None:
            return f"the cluster will lose {nodes}"
        return f"the cluster will lose {nodes} in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
