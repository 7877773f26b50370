"""Word that a node of this group of workers is about to be taken away, as spot machines are."""

from __future__ import annotations

import time
from typing import Any


class Notice:
    """What the cluster has said so far. Every worker of a group has one, and asks it equally often."""

    def __init__(self) -> None:
        from ray.train import get_context

        try:
            get_context()
            self._supervised = True
        except RuntimeError:  # no worker of Ray Train: nobody would tell
            self._supervised = False
        self._heard: Any = None

    def news(self) -> str | None:
        """In words, what has been said since the last question, the same to all workers; None if nothing.

        A barrier: every worker must ask, after the same step.
        """
        if not self._supervised:
            return None
        from ray.train import get_preemption_info

        said = get_preemption_info()
        if said is None or said == self._heard:
            return None
        self._heard = said
        nodes = f"{len(said.preempted_node_ids)} node{'s' * (len(said.preempted_node_ids) > 1)}"
        if said.deadline_ms is None:
            return f"the cluster is to lose {nodes}"
        return f"the cluster is to lose {nodes} in {max(0.0, said.deadline_ms / 1000 - time.time()):.0f} s"
