"""The settings of the base model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from corsa.config.base import Frozen, plain

Dtype = Literal["float32", "bfloat16", "nf4"]
"""Data type of a frozen base. nf4: linear layers in blocks of 4 bits by bitsandbytes, all else in bfloat16."""

NF4_IS_NOT_SHARDED = (
    "--dtype nf4 is not sharded among workers: leave --sharding.zero-stage 3 out, or give --dtype bfloat16"
)
"""Why a base in 4 bits is refused at stage 3."""


class ModelConfig(Frozen):
    """A base model and its prompt template. Part of the identity of everything computed with it."""

    name: Annotated[str, plain("model")] = Field(
        default="smollm2-135m",
        description="alias, Hugging Face id, directory, GGUF file, or random:<architecture or directory>",
    )
    revision: Annotated[str | None, plain()] = Field(
        default=None, description="hub revision; for a directory or file, set to its digest"
    )
    dtype: Annotated[Dtype, plain()] = Field(
        default="float32",
        description="data type of the frozen base, LoRA is always float32; nf4: 4 bits by bitsandbytes, on a GPU",
    )
    template: Annotated[Literal["qa", "chat"], plain()] = Field(
        default="qa", description="qa: 'Q: ...' and 'A:' (paper, Fig. 7); chat: the tokenizer's chat template"
    )

    @property
    def element(self) -> Literal["float32", "bfloat16"]:
        """Data type of activations, and of all weights that are not in 4 bits."""
        return "bfloat16" if self.dtype == "nf4" else self.dtype
