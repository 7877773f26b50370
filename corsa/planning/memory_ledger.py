"""Counts the live bytes of a training step after every operation, by purpose.

A dispatch mode sees each tensor that torch creates, real or fake, and is notified when its storage is freed. Under
`FakeTensorMode` tensors have shapes but no memory, so a laptop can count the step of a 14B model.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ITEMS = ("base", "lora", "optimizer", "sam", "gradients", "activations", "logits", "working")
"""Purposes of memory. sam: the copy that restores phi; gradients: all other tensors of phi's size (g_SFT and g_DPO of
both phases, e, the merged gradient); activations: saved for the backward pass; working: short-lived tensors."""

KINDS = ("LoRA", "norms", "attention", "MLP", "other layers", "losses")
"""Kinds of layers that keep tensors for the backward pass. LoRA: inputs of linear layers, and its narrow products."""

_aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Counts live bytes by item while it is active.

    Args:
        phi: the LoRA parameters. Their shape is used to infer the purpose of a tensor.
        factors: shapes of its factors.
        vocabulary: size of the output head. A tensor whose last dimension has this size is logits.
        kept: for each fake mask of kept positions, how many positions it keeps (a fake mask has no values).
    """

    def __init__(
        self, phi: Tensor, factors: Iterable[Sequence[int]], vocabulary: int, kept: Sequence[tuple[Tensor, int]] = ()
    ) -> None:
        super().__init__()
        self.live: dict[str, int] = dict.fromkeys(ITEMS, 0)
        self.flops = 0
        self.saved = 0
        self.kept: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
        """What `saved` consists of, by the kind of the layer that keeps it: bytes, and bytes if every tensor had the
        base's data type."""
        self.series: list[tuple[int, ...]] = []
        """Live bytes by item (in the order of `ITEMS`) after every operation."""
        self.backward: list[bool] = []
        """Whether that operation was part of a backward pass."""
        self._phi, self._vocabulary, self._kept = phi, vocabulary, kept
        self._factors = {tuple(shape) for shape in factors} | {tuple(reversed(shape)) for shape in factors}
        self._entries: dict[int, _Entry] = {}
        self._inside: list[str] = []
        self._element = 4

    @contextmanager
    def watching(self, model: nn.Module, sites: Collection[str]) -> Iterator[None]:
        """Note inside the block which kind of layer keeps a tensor. sites: names of the layers with LoRA."""
        self._element = next(model.parameters()).element_size()
        handles = []
        for name, module in model.named_modules():
            kind = _kind(module, name in sites)
            handles += [
                module.register_forward_pre_hook(lambda *_, kind=kind: self._enter(kind)),
                module.register_forward_hook(lambda *_: self._leave()),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, kind: str | None) -> None:
        self._inside.append(kind or (self._inside or [KINDS[-2]])[-1])

    def _leave(self) -> None:
        self._inside.pop()

    def hold(self, item: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that already exist."""
        for tensor in tensors:
            self._count(tensor, item)

    def saving(self) -> saved_tensors_hooks:
        """Counts what autograd saves as activations (and its bytes in `saved`) while the context is active."""
        return saved_tensors_hooks(self._save, lambda tensor: tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # fake tensors are asked thousands of times: it is no operation
            return args[0].fake_device
        if self._kept:  # fake tensors have no values: return those of a step without conflict
            if func is _aten._local_scalar_dense.default:
                return 1.0
            if func is _aten.index.Tensor:
                args = (args[0], [i for index in args[1] for i in self._positions(index)])
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        backward = torch._C._current_graph_task_id() != -1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf, self._purpose(func, leaf, args, backward))
        self.series.append(tuple(self.live.values()))
        self.backward.append(backward)
        return out

    def _positions(self, index: Tensor | None) -> list[Tensor | None]:
        """Converts a fake mask to fake positions, with the number of positions that the real mask keeps."""
        if index is None or index.dtype != torch.bool:
            return [index]
        count = next(count for mask, count in self._kept if mask is index)
        return [index.new_empty(count, dtype=torch.long) for _ in range(index.dim())]

    def _purpose(self, func: Any, tensor: Tensor, args: Sequence[Any], backward: bool) -> str:
        shape, phi = tuple(tensor.shape), self._phi
        if shape[-1:] == phi.shape[-1:]:
            copied = func is _aten.clone.default and args[0].untyped_storage() is phi.untyped_storage()
            return "sam" if copied else "gradients"
        if backward and (shape[-2:] in self._factors or shape[-1:] == (phi.shape[-1],)):
            return "gradients"
        return "logits" if shape[-1:] == (self._vocabulary,) else "working"

    def _count(self, tensor: Tensor, item: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._entries:
            return
        entry = self._entries[key] = _Entry(item, storage.nbytes())
        self.live[item] += entry.bytes
        entry.ends = weakref.ref(storage, lambda _: self._free(key))

    def _free(self, key: int) -> None:
        entry = self._entries.pop(key)
        self.live[entry.item] -= entry.bytes

    def _save(self, tensor: Tensor) -> Tensor:
        entry = self._entries.get(id(tensor.untyped_storage()))
        if entry is not None and not entry.saved and entry.item not in ("base", "lora"):
            entry.saved = True
            if True not in self.backward:  # only the first forward pass
                size = (
                    min(tensor.element_size(), self._element) if tensor.is_floating_point() else tensor.element_size()
                )
                kept = self.kept[(self._inside or [KINDS[-1]])[-1]]
                self.saved += entry.bytes
                kept[0] += entry.bytes
                kept[1] += entry.bytes // tensor.element_size() * size
            if entry.item == "working":
                self.live["working"] -= entry.bytes
                self.live["activations"] += entry.bytes
                entry.item = "activations"
        return tensor


class _Entry:
    """One storage: its purpose, its bytes, whether autograd saved it, and the weak reference that reports its end."""

    def __init__(self, item: str, bytes_: int) -> None:
        self.item, self.bytes, self.saved = item, bytes_, False
        self.ends: Any = None


def _kind(module: nn.Module, site: bool) -> str | None:
    """The kind of a layer, by the names of transformers' classes; None: that of the layer around it."""
    name = type(module).__name__
    return "LoRA" if site else next((k for k, part in _PARTS.items() if part in name), None)


_PARTS = {"norms": "Norm", "attention": "Attention", "MLP": "MLP"}


def as_items(row: Sequence[int]) -> Mapping[str, int]:
    """One entry of a ledger's series by name."""
    return dict(zip(ITEMS, row, strict=True))
