"""Where a step's time goes, seen from outside: by when it calls the model, the reduction and the optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def clock(device: torch.device, cpu_time: bool = False) -> Callable[[], float]:
    """Seconds, once the device has done what it was given. `cpu_time`: those of this process's threads together, which
    other work on a shared machine hardly touches.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if cpu_time else time.perf_counter()

    return now


class Timeline:
    """Stands between `corsa_step` and what it is given, and cuts its time at every call.

    `seconds` adds up, by name: `packing`, `forward`, `backward_1` and `backward_2` (at phi and at phi + e, with the
    losses), `reduction`, `vector` (PCGrad, perturbation, clipping), `optimizer`, and `log`.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, now: Callable[[], float]) -> None:
        self._model, self._now = model, now
        optimizer.register_step_pre_hook(lambda *_: self.cut("vector"))
        optimizer.register_step_post_hook(lambda *_: self.cut("optimizer"))
        self.start()

    def start(self) -> None:
        """A step begins."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._asked, self._at = 1, False, self._now()

    def cut(self, name: str) -> None:
        """What has passed since the last cut was `name`."""
        now = self._now()
        self.seconds[name] += now - self._at
        self._at = now

    def model(self, **inputs: Any) -> Any:
        """The model. Between two calls of a phase lies a backward pass, before the first of it vector work."""
        self.cut(f"backward_{self._phase}" if self._asked else "vector")
        self._asked = True
        output = self._model(**inputs)
        self.cut("forward")
        return output

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over one worker: a phase's last backward pass is over, the next phase comes."""
        if self._asked:
            self.cut(f"backward_{self._phase}")
            self._asked, self._phase = False, self._phase + 1
        self.cut("reduction")
        return tensor

    @property
    def outside_the_passes(self) -> float:
        """Seconds that are neither forward nor backward."""
        return sum(s for name, s in self.seconds.items() if name != "forward" and not name.startswith("backward"))
