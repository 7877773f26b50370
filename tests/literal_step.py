"""The step of Algorithm 1 written out literally (DESIGN section 2), and a small model with LoRA to compare it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import CPU, LORA, reference_of, shaken, tiny_model, triplets, with_reference
from torch import Tensor
from torch.func import functional_call

from corsa.algorithm.batch import Batch, MicroBatch, counts
from corsa.algorithm.packing import Triplet, pack
from corsa.algorithm.pcgrad import merge, products
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.step import corsa_step
from corsa.config import StepConfig
from corsa.lora.flat import Lora


def alone(tensor: Tensor) -> Tensor:
    """The sum over one worker."""
    return tensor


def config(**fields: Any) -> StepConfig:
    return StepConfig.model_validate({"lambda" if k == "lam" else k: v for k, v in fields.items()})


def cut(edits: Sequence[Triplet], size: int) -> Batch:
    """The edits as one worker's batch, in micro-batches of `size`."""
    parts = [edits[i : i + size] for i in range(0, len(edits), size)]
    micro = [MicroBatch(pack(part), reference_of(part), counts([part], CPU)) for part in parts]
    return Batch(micro, len(edits), counts([edits], CPU))


def rows(*configs: StepConfig) -> RowSettings:
    return RowSettings.of(configs, CPU)


def merged_gradient(a: Tensor, b: Tensor, lam: float | Tensor, how: Any, eps: float) -> Tensor:
    """g_PC of two gradients (K, P)."""
    return merge([a, b], products([a, b]), [lam], how, eps)


class Setting:
    """A model with LoRA whose factors are all non-zero, six edits, and the same model without hooks."""

    def __init__(self) -> None:
        self.plain = tiny_model()
        self.edits = with_reference(self.plain, triplets(6))
        self.model = tiny_model()
        self.lora = shaken(Lora(self.model, LORA))
        self.start = self.lora.phi.detach().clone()

    def step(
        self, config: StepConfig, optimizer: torch.optim.Optimizer, size: int = 6, clip: float = 1e9
    ) -> dict[str, Any]:
        (log,) = corsa_step(self.model, self.lora.phi, cut(self.edits, size), rows(config), optimizer, clip, alone)
        return log

    def gradient(self, config: StepConfig, size: int = 6) -> Tensor:
        """The gradient given to the optimizer, recovered from one step of SGD at rate 1."""
        self.step(config, torch.optim.SGD([self.lora.phi], lr=1.0), size)
        return self.start - self.phi

    @property
    def phi(self) -> Tensor:
        return self.lora.phi.detach()


# The equations of DESIGN section 2, literally: merged weights instead of hooks, one row and all logits at a time, one
# backward call per objective.


def merged(model: torch.nn.Module, lora: Lora, phi: Tensor) -> dict[str, Tensor]:
    """The weights W + alpha / rank * B A of every site, from the documented layout of phi (1, P)."""
    weights: dict[str, Tensor] = {**dict(model.named_parameters())}
    at = 0
    rank = lora.config.rank
    for site in lora.sites:
        a = phi[0, at : at + rank * site.inputs].view(rank, site.inputs)
        at += rank * site.inputs
        b = phi[0, at : at + site.outputs * rank].view(site.outputs, rank)
        at += site.outputs * rank
        name = f"{site.name}.weight"
        weights[name] = weights[name] + lora.config.alpha / rank * b @ a
    assert at == phi.shape[1]
    return weights


def plain_logp(model: torch.nn.Module, weights: dict[str, Tensor], prompt: Sequence[int], answer: Sequence[int]):
    """Log p(y|x) from a separate forward pass with full logits."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}).logits
    logp = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp[range(len(answer)), list(answer)].sum()


def literal_losses(setting: Setting, phi: Tensor, edits: Sequence[Triplet], c: StepConfig) -> tuple[Tensor, Tensor]:
    """L_SFT and L_DPO."""
    weights = merged(setting.plain, setting.lora, phi)
    new, old = (
        torch.stack([plain_logp(setting.plain, weights, t.prompt, getattr(t, side)) for t in edits])
        for side in ("new", "old")
    )
    ref_new, ref_old = reference_of(edits)
    m = sum(len(t.new) for t in edits) if c.reduction == "token" else len(edits)
    return -new.sum() / m, -torch.log(torch.sigmoid(c.beta * ((new - ref_new) - (old - ref_old)))).mean()


def literal_gradient(setting: Setting, phi: Tensor, edits: Sequence[Triplet], c: StepConfig) -> Tensor:
    """g_PC at phi."""
    phi = phi.clone().requires_grad_()
    sft, dpo = literal_losses(setting, phi, edits, c)
    (g1,) = torch.autograd.grad(sft, phi, retain_graph=True)
    (g2,) = torch.autograd.grad(dpo, phi)
    return literal_merge(g1, g2, c)


def literal_merge(g1: Tensor, g2: Tensor, c: StepConfig) -> Tensor:
    """g_PC from g_SFT and g_DPO, as each form is published."""
    if c.pcgrad == "off":
        return g1 + c.lambda_ * g2
    inner = float((g1 * g2).sum())
    if c.pcgrad == "authors":  # the list is [g_DPO, g_SFT]; each is projected against the current value of the other
        changed = [g2, g1]
        for i, j in ((0, 1), (1, 0)):
            inner = float((changed[i] * changed[j]).sum())
            if inner < -1e-6:  # of the second, rounding is left
                changed[i] = changed[i] - inner / float((changed[j] * changed[j]).sum()) * changed[j]
        return (c.lambda_ * changed[0] + changed[1]) / 2
    p1 = g1 - inner / float((g2 * g2).sum()) * g2 if inner < 0 else g1
    other = p1 if c.pcgrad == "algorithm1" else g1
    p2 = g2 - inner / float((other * other).sum()) * other if inner < 0 else g2
    return p1 + c.lambda_ * p2


def literal_sharp_gradient(setting: Setting, phi: Tensor, edits: Sequence[Triplet], c: StepConfig) -> Tensor:
    """g_PC at phi + e."""
    g = literal_gradient(setting, phi, edits, c)
    if c.radius == "adaptive":  # ASAM: the worst point of a linear loss within |T^-1 e| <= rho
        e = c.rho * phi**2 * g / (phi * g).norm()
    elif c.radius == "relative":
        e = c.rho * phi.norm() * g / g.norm()
    else:
        e = c.rho * g / g.norm()
    return literal_gradient(setting, phi + e, edits, c)
