"""The two objectives of an update (paper, Section 3, Eq. 4): L_Update = L_SFT + lambda * L_DPO.

Both are sums over the given edits, divided by a count that the caller gives. So the losses of the parts of a batch
(workers, micro-batches) add up to the loss of the whole batch. K adapters trained together have K losses: (K, 1).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sft_loss(logp: Tensor, count: float | Tensor) -> Tensor:
    """L_SFT = - sum_i logp(y_new_i|x_i) / count.

    Args:
        logp: (2, K, E), new answers first, nats.
        count: answer tokens of the whole batch (`reduction="token"`) or its edits (`"sequence"`).
    """
    return -logp[0].sum(-1, keepdim=True) / count


def dpo_loss(logp: Tensor, reference: Tensor, beta: float | Tensor, count: float | Tensor) -> Tensor:
    """L_DPO = - sum_i log sigmoid(beta * [(logp - logp_ref)(y_new_i) - (logp - logp_ref)(y_old_i)]) / count.

    Args:
        logp, reference: (2, K, E), new answers first, nats; `reference` is the base model's.
        beta: inverse temperature, a number or a column (K, 1).
        count: edits of the whole batch that have an old answer, a number or (K, 1).
    """
    gain = logp - reference
    return -F.logsigmoid(beta * (gain[0] - gain[1])).sum(-1, keepdim=True) / count
