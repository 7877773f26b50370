"""Log-probabilities of answers in blocks of tokens, and the operations that a step launches."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from literal_step import alone, config, rows
from tiny import CPU, LORA, shaken, tiny_model, triplets
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corsa.algorithm import logprobs
from corsa.algorithm.batch import Batch, MicroBatch, counts
from corsa.algorithm.packing import pack
from corsa.algorithm.step import corsa_step, gradients
from corsa.lora.flat import Lora

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_in_blocks_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Values and both cotangents of a batched backward pass, where answers share positions and targets. The gradient is
    rounded to the logits' data type once: also where p is near 1, and the softmax nearly cancels with the target's 1.
    """
    monkeypatch.setattr(logprobs, "BLOCK", 3)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 7, generator=draw).mul(4).to(dtype)
    logits[4, 2] = 14.0  # p = 0.9999
    logits.requires_grad_()
    index, target = torch.tensor([0, 0, 4, 4, 2, 9, 3]), torch.tensor([1, 1, 2, 5, 6, 0, 3])
    cotangents = torch.randn(2, len(index), generator=draw)
    found = logprobs.log_p(logits, replace(pack(triplets(1))[0], index=index, target=target))
    written = logits.float().log_softmax(-1)[index, target]
    torch.testing.assert_close(found, written, rtol=1e-6, atol=1e-5)
    one, other = (
        torch.autograd.grad(value, logits, cotangents, is_grads_batched=True)[0] for value in (found, written)
    )
    assert one.dtype == dtype
    torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-7)


def test_no_step_holds_all_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bfloat16 base, no float32 tensor has more rows of the vocabulary than a block."""
    monkeypatch.setattr(logprobs, "BLOCK", 8)
    model = tiny_model().to(torch.bfloat16)  # type: ignore[arg-type]
    lora, edits = shaken(Lora(model, LORA), 0.02), triplets(6, long=[2])
    rows_ = pack(edits, dtype=torch.bfloat16)
    kept = max(int(r.keep.count_nonzero()) for r in rows_)
    assert kept > 8
    largest = {torch.float32: 0, torch.bfloat16: 0}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.shape[-1:] == (1024,) and leaf.dtype in largest:
                    largest[leaf.dtype] = max(largest[leaf.dtype], leaf.numel() // 1024)
            return out

    part = MicroBatch(rows_, torch.full((2, 6), -5.0), counts([edits], CPU))
    with Watch():
        gradients(model, lora.phi, Batch([part], 6, counts([edits], CPU)), rows(config()), alone)
    assert largest == {torch.float32: 2 * 8, torch.bfloat16: 2 * kept}  # the gradients of two objectives


def test_a_step_launches_no_more_operations_than_its_layers_need() -> None:
    """Counted by torch's profiler. A site has one product forward and two backward with B, for all objectives together,
    and the sites with one input (q, k and v; gate and up) have one and two with their A factors.
    """
    model = tiny_model("qwen3")
    lora, edits = shaken(Lora(model, LORA), 0.02), triplets(4)
    part = MicroBatch(pack(edits), torch.full((2, 4), -5.0), counts([edits], CPU))
    batch = Batch([part], 4, counts([edits], CPU))
    optimizer = torch.optim.AdamW([lora.phi], lr=1e-4, fused=True)
    corsa_step(model, lora.phi, batch, rows(config()), optimizer, 1.0, alone)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        corsa_step(model, lora.phi, batch, rows(config()), optimizer, 1.0, alone)
    counted = Counter(event.name for event in profiled.events() or () if not _inner(event, event.name))
    sites, inputs, without_gradient = len(lora.sites), 4 * model.config.num_hidden_layers, 1  # the first layer's input
    assert counted["aten::bmm"] == 2 * (3 * sites + 3 * inputs - without_gradient)
    assert counted["aten::item"] <= 4  # each is a wait for the device


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_pass_compiled_by_inductor_takes_no_batch_of_cotangents() -> None:
    """The reason why torch.compile is not a setting. If this fails, docs/performance.md is out of date."""
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4)
    out = torch.compile(lambda w: torch.nn.functional.silu(x @ w.T))(weight)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(out, weight, torch.randn(2, 3, 4), is_grads_batched=True)


def _inner(event: Any, name: str) -> bool:
    """Whether the event contains one of this name: an operation on a batch of cotangents appears at both levels."""
    return any(child.name == name or _inner(child, name) for child in event.cpu_children)
