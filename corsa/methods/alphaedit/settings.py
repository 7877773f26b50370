"""AlphaEdit's settings: the published ones for each architecture. Imports no torch.

All numbers of `PUBLISHED` are from EasyEdit (zjunlp/EasyEdit, `hparams/AlphaEdit/*.yaml`); each row names its file. The
authors' own file (jianghoucheng/AlphaEdit, `hparams/AlphaEdit/Llama3-8B.json`) has the same numbers as llama3-8b.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corsa.config import AlphaEditConfig
from corsa.methods.memit.settings import RELATED, EditSettings, common_settings


@dataclass(frozen=True)
class Published:
    """Published settings. The edited layers of these models are 4 to 8, as in MEMIT's table.

    Attributes:
        family: transformers' model type.
        source: the model and its file in EasyEdit.
        l2: weight of the squared norm of the change (1 in the paper's Eq. 14).
        learning_rate: of Adam.
        weight_decay: weight of |delta| / |h|^2.
        clamp_norm_factor: upper bound of |delta|, in units of |h|.
        threshold: eigenvalues of C below this belong to the null space.
        gradient_steps: maximum number of Adam steps.
        kl_factor: weight of the KL term.
    """

    family: str
    source: str
    l2: float
    learning_rate: float
    weight_decay: float
    clamp_norm_factor: float
    threshold: float = 2e-2
    gradient_steps: int = 25
    kl_factor: float = 0.0625


PUBLISHED = (
    Published("llama", "Llama-3-8B and 3.1-8B, llama3-8b.yaml", 10.0, 0.1, 0.5, 0.75),
    Published("qwen2", "Qwen2.5-7B, qwen2.5-7b.yaml", 1.0, 0.5, 1e-3, 4.0),
)
"""Published models. Other families use the first row. Neither threshold nor l2 is scaled to a model's size: the report
says how much of the keys' space is left. If you change a number here, increase the version of
`corsa.experiments.kinds.ROUND`: the identity of a round contains the configured settings, not this table.
"""


@dataclass(frozen=True, kw_only=True)
class AlphaEditSettings(EditSettings):
    """All settings of a run: `AlphaEditConfig` with the open values filled."""

    threshold: float
    l2: float


def settings_for(architecture: Any, config: AlphaEditConfig) -> AlphaEditSettings:
    """The settings for a model: those of `config`, with published values for those left open.

    Args:
        architecture: configuration of the model (transformers).
        config: as configured.

    Raises:
        CorsaError: a chosen layer does not exist.
    """
    family = architecture.get_text_config().model_type
    found = next((row for row in PUBLISHED if row.family == RELATED.get(family, family)), PUBLISHED[0])
    return AlphaEditSettings(
        threshold=found.threshold if config.threshold is None else config.threshold,
        l2=found.l2 if config.l2 is None else config.l2,
        source=found.source,
        **common_settings(architecture, config, found),
    )
