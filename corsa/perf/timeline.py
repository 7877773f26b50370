"""Breaks down the time of a step by its calls of the model, the reduction and the optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def clock(device: torch.device, cpu_time: bool = False) -> Callable[[], float]:
    """A clock in seconds that waits until the device has finished its work. `cpu_time`: the sum over this process's
    threads, which other work on a shared machine hardly affects.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if cpu_time else time.perf_counter()

    return now


class Timeline:
    """Wraps the arguments of `corsa_step` and cuts its time at every call.

    `seconds` adds up, by name: `packing`, `forward`, `backward_1` and `backward_2` (at phi and at phi + e, with the
    losses), `reduction`, `vector` (PCGrad, perturbation, clipping), `optimizer`, and `log`.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, now: Callable[[], float]) -> None:
        self._model, self._now = model, now
        optimizer.register_step_pre_hook(lambda *_: self.cut("vector"))
        optimizer.register_step_post_hook(lambda *_: self.cut("optimizer"))
        self.start()

    def start(self) -> None:
        """Start a step."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._asked, self._at = 1, False, self._now()

    def cut(self, name: str) -> None:
        """Assign the time since the last cut to `name`."""
        now = self._now()
        self.seconds[name] += now - self._at
        self._at = now

    def model(self, **inputs: Any) -> Any:
        """Calls the model. In each phase, vector work precedes the first call and a backward pass each later one."""
        self.cut(f"backward_{self._phase}" if self._asked else "vector")
        self._asked = True
        output = self._model(**inputs)
        self.cut("forward")
        return output

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over one worker. Marks the end of a phase's last backward pass."""
        if self._asked:
            self.cut(f"backward_{self._phase}")
            self._asked, self._phase = False, self._phase + 1
        self.cut("reduction")
        return tensor

    @property
    def outside_the_passes(self) -> float:
        """Seconds outside the forward and backward passes."""
        return sum(s for name, s in self.seconds.items() if name != "forward" and not name.startswith("backward"))
