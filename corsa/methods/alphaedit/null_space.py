"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355): MEMIT's edits, without effect on preserved keys.

Targets, keys and residuals are MEMIT's (`corsa.methods.memit.algorithm.write`). The change of a layer is projected on
the directions that the keys of other texts hardly have, so it does not change the layer's outputs for these keys. The
keys of earlier rounds' edits are in the solve, so that a change does not undo them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corsa.data.edit import Edit
from corsa.errors import CorsaError
from corsa.methods.alphaedit.settings import AlphaEditSettings
from corsa.methods.memit.algorithm import Post, Written, closed_form, write
from corsa.methods.memit.key_statistics import KeyStatistics
from corsa.models.encoding import Encoder


def null_space(mean: Tensor, threshold: float) -> Tensor:
    """An orthonormal basis U (inputs, d) of the eigenvectors of C with eigenvalues below `threshold`; P = U U^T.

    Args:
        mean: C = E[k k^T] of the preserved keys, (inputs, inputs), float64.
        threshold: below it, an eigenvalue counts as zero.
    """
    values, vectors = torch.linalg.eigh(mean)
    return vectors[:, values < threshold]


def projected_form(basis: Tensor, before: Tensor, keys: Tensor, residuals: Tensor, l2: float) -> Tensor:
    """Delta = R K^T P (K_p K_p^T P + K K^T P + l2 I)^-1 (Eq. 14), in float64.

    As P = U U^T, this is U^T times the solve for the coordinates U^T K, which is symmetric and smaller.

    Args:
        basis: U, (inputs, d).
        before: K_p, (inputs, earlier edits).
        keys: K, (inputs, E).
        residuals: R, (outputs, E).
        l2: weight of |Delta P|^2.

    Returns:
        Delta (outputs, inputs), float64.
    """
    known = basis.mT @ before.double()
    cost = known @ known.mT + l2 * torch.eye(len(known), dtype=known.dtype, device=known.device)
    return closed_form(cost, basis.mT @ keys.double(), residuals) @ basis.mT


def alphaedit(
    model: Any,
    encoder: Encoder,
    edits: Sequence[Edit],
    statistics: KeyStatistics,
    before: Mapping[int, Tensor],
    settings: AlphaEditSettings,
    *,
    seed: int,
    post: Post = lambda line: None,
) -> Written:
    """The change of the down projections for all `edits` at once.

    Args:
        model: the model as edited so far; it is not modified.
        encoder: makes its prompts and answers.
        edits: the edits to write.
        statistics: of the preserved keys.
        before: layer -> (inputs, earlier edits): the keys of the edits of all earlier rounds. Empty in the first.
        settings: for the model.
        seed: for the sampled prefixes.
        post: shows progress.

    Returns:
        As `write`. Further metrics: `threshold` and `l2` as used, and `free`, the smallest share of a layer's inputs
        that the null space has.

    Raises:
        CorsaError: the statistics are too few, or a layer has no direction below the threshold.
    """
    statistics.check(settings.layers)
    bases: dict[int, Tensor] = {}
    for layer in settings.layers:
        bases[layer] = null_space(statistics.mean(layer).to(model.device), settings.threshold)
        if not bases[layer].shape[1]:
            raise CorsaError(
                f"no eigenvalue of the key statistics of layer {layer} is below {settings.threshold:g}, so AlphaEdit "
                "has no direction to change: raise --alphaedit.threshold"
            )

    def solve(layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        known = before[layer].to(keys.device) if layer in before else keys[:, :0]
        return projected_form(bases[layer], known, keys, residuals, settings.l2)

    written = write(model, encoder, edits, solve, settings, seed=seed, post=post)
    free = min(basis.shape[1] / len(basis) for basis in bases.values())
    return written._replace(
        metrics={"threshold": settings.threshold, "l2": settings.l2, "free": free, **written.metrics}
    )
