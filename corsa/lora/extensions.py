"""Detects PEFT adapters with more than two factors per linear layer. Does not import torch: planning uses it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corsa.errors import CorsaError

EXTENSIONS = (
    *("use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("alora_invocation_tokens", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "lora_bias", "fan_in_fan_out"),
)
"""Settings of PEFT's LoraConfig that make an adapter more than a product of two factors added to linear layers."""

INITIAL = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that do not change the base model; PiSSA, OLoRA and the others change it."""


def refuse_extensions(config: Mapping[str, Any], file: Path) -> None:
    """Raises `CorsaError` if an `adapter_config.json` is not plain LoRA."""
    found = None
    if config.get("peft_type") != "LORA":
        found = f"peft_type is {config.get('peft_type')}"
    elif (config.get("bias") or "none") != "none":
        found = f"bias is {config['bias']}"
    elif (initial := config.get("init_lora_weights", True)) not in INITIAL:
        found = f"init_lora_weights is {initial}, which changes the base model"
    elif extensions := [name for name in EXTENSIONS if config.get(name)]:
        found = f"{extensions[0]} is set"
    if found is not None:
        raise CorsaError(
            f"{file}: {found}; only plain LoRA can be read: merge the adapter into its base model with PEFT, and use "
            "that as the base"
        )
