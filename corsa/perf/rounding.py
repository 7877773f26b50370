"""How much of SAM's perturbation survives a base in bfloat16.

SAM uses the change d = g(phi + e) - g(phi) that a small perturbation makes to the gradient. A bfloat16 base rounds its
activations in every layer, so both gradients carry rounding errors of their own. Where d is not larger than these, its
direction is noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corsa.algorithm.batch import Batch
from corsa.algorithm.pcgrad import dot, norm
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.sam import perturbation_at, perturbed
from corsa.algorithm.step import gradients
from corsa.training.worker_context import Loaded

DROWNED = 0.5
"""Below this cosine with the change in float32, more than three quarters of the squared length of d are rounding."""


@dataclass(frozen=True)
class Rounding:
    """change, change_float32: |g(phi + e) - g(phi)| / |g(phi)| with the base as it is and in float32, with the same e.
    cosine: between the two changes.
    """

    change: float
    change_float32: float
    cosine: float

    @property
    def told(self) -> str:
        """The finding as a sentence."""
        verdict = (
            "drowns in rounding: use --dtype float32, a larger --corsa.rho, or LoRA without SAM"
            if self.cosine < DROWNED
            else "survives rounding"
        )
        return (
            f"the perturbation changes the gradient by {100 * self.change:.2f} % of its length, in float32 by "
            f"{100 * self.change_float32:.2f} %, cosine {self.cosine:.2f}: it {verdict}"
        )


def measure_rounding(loaded: Loaded, batch: Callable[[], Batch], settings: RowSettings) -> Rounding:
    """Compare the change of the gradient with that of the same base in float32. The base stays in float32 afterwards.

    `batch` cuts the same edits for the base's data type.
    """
    phi = loaded.lora.phi
    e: Tensor | None = None
    lengths, changes = [], []
    for dtype in (loaded.model.dtype, torch.float32):
        model = loaded.model.to(dtype)  # type: ignore[arg-type]
        cut = batch()
        g = gradients(model, phi, cut, settings, lambda tensor: tensor).merged(settings)
        if e is None:
            shared = settings.shared
            e = perturbation_at(phi.detach(), g, settings.column("rho"), shared.eps, shared.radius)
        with perturbed(phi, e):
            change = gradients(model, phi, cut, settings, lambda tensor: tensor).merged(settings).sub_(g)
        lengths.append(float(norm(change) / norm(g)))
        changes.append(change)
    own, exact = changes
    cosine = float(dot(own, exact) / (norm(own) * norm(exact)).clamp(min=settings.shared.eps))
    return Rounding(lengths[0], lengths[1], cosine)
