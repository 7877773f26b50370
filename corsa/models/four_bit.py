"""A frozen base in 4 bits: its linear layers in NF4 blocks by bitsandbytes (QLoRA, Dettmers et al. 2023), the rest in
bfloat16. LoRA stays in float32.

A layer's weights are made bfloat16 again each time it is used. A base takes a quarter to a third of its memory, and a
step takes longer: by how much was not measured.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from corsa.config.model import NF4_IS_NOT_SHARDED
from corsa.errors import CorsaError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

BLOCK, NESTED = 64, 256
"""Weights that share a constant, and constants that share a constant of their own (double quantization)."""


def quantization() -> BitsAndBytesConfig:
    """The configuration that transformers loads such a base with. The head and the embeddings stay as they are."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def bytes_in_4_bits(weights: int) -> int:
    """Bytes of a matrix of this many weights: half a byte each, one byte per block, four per block of blocks.

    The tables of values and offsets are left out: about 1 KiB a layer.
    """
    blocks = -(-weights // BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // NESTED)


def refuse_without_gpu(device: torch.device | str, *, sharded: bool = False, random: bool = False) -> None:
    """Raises `CorsaError` with the reason if a base cannot be held in 4 bits here."""
    remedy = "give --dtype bfloat16"
    if torch.device(device).type != "cuda":
        raise CorsaError(
            f"--dtype nf4 holds the base in 4 bits on a GPU, and this model is loaded on the {torch.device(device)}: "
            f"add --placement.gpu where there is a GPU, or {remedy}"
        )
    if find_spec("bitsandbytes") is None:
        raise CorsaError(f"--dtype nf4 needs bitsandbytes: pip install 'corsa[four-bit]', or {remedy}")
    if sharded:
        raise CorsaError(NF4_IS_NOT_SHARDED)
    if random:
        raise CorsaError(f"--dtype nf4 reads the weights of a model, and a random: model has none: {remedy}")
