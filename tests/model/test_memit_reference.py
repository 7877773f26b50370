"""MEMIT and AlphaEdit against literal references, written only from the papers' equations (Meng et al. 2023; Fang et
al. 2025).

The reference asks one question at a time, without padding, and writes the changes into a copy of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from corsa.data.edit import Edit
from corsa.lora.attached import attached
from corsa.methods.alphaedit.null_space import alphaedit
from corsa.methods.alphaedit.settings import AlphaEditSettings
from corsa.methods.memit.algorithm import memit, sample_prefixes
from corsa.methods.memit.key_statistics import KeyStatistics
from corsa.methods.memit.settings import EditSettings, Settings
from corsa.models.encoding import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(
    layers=(1, 2),
    weight=20.0,
    learning_rate=0.2,
    gradient_steps=6,
    weight_decay=10.0,
    clamp_norm_factor=0.3,
    kl_factor=1.0,
    prefixes=3,
    prefix_tokens=4,
    source="",
)
FACTS = [
    ("Who leads Norway?", "Norway", "Anna Berg"),
    ("Which river flows through Bremen today?", "Bremen", "the Elbe"),
    ("In which year was the Acme Company founded?", "the Acme Company", "1911"),
]
SEED = 5


def model_of(family: str) -> Any:
    """Four layers in float64, with an output head that the residual stream decides."""
    model: Any = tiny_model(family, 49152, num_hidden_layers=4, tie_word_embeddings=False)
    model.lm_head.weight.mul_(10)
    return model.double()


class Reference:
    """MEMIT, literally.

    Notation of the paper: for an edit (s, r, o), x_j are the prefixes (the first is none), h_i^L is the residual at the
    last token of s after layer L, k^l the input of layer l's down projection there, and W^l its weight.
    """

    def __init__(self, model: Any, tokenizer: Any, prefixes: Sequence[str], settings: EditSettings) -> None:
        self.model, self.tokenizer, self.settings = copy.deepcopy(model), tokenizer, settings
        self.prefixes = ["", *(f"{text}. " for text in prefixes)]
        self.last = settings.layers[-1]

    def ids(self, question: str, subject: str) -> tuple[list[int], int]:
        """The tokens of a prompt, and which of them is the last one of the subject."""
        text = f"Q: {question}\nA:"
        read = self.tokenizer(text, return_offsets_mapping=True)
        end = text.rindex(subject) + len(subject)
        return read["input_ids"], next(i for i, (a, b) in enumerate(read["offset_mapping"]) if a < end <= b)

    def run(self, ids: list[int], place: int, delta: Tensor | None = None) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """Give log p of every next token (T, V), the keys k^l (T, inputs), and h^L at `place` without delta."""
        keys: dict[int, Tensor] = {}
        seen: list[Tensor] = []

        def residual(module: Any, args: Any, output: Tensor) -> Tensor:
            seen.append(output[0, place].detach().clone())
            changed = output.clone()
            if delta is not None:
                changed[0, place] = changed[0, place] + delta
            return changed

        layers = self.model.model.layers
        hooks = [layers[self.last].register_forward_hook(residual)]
        for layer in self.settings.layers:

            def key(module: Any, args: Any, layer: int = layer) -> None:
                keys[layer] = args[0][0]

            hooks.append(layers[layer].mlp.down_proj.register_forward_pre_hook(key))
        logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        for hook in hooks:
            hook.remove()
        return logits.log_softmax(-1), keys, seen[0]

    def target(self, question: str, subject: str, answer: list[int]) -> Tensor:
        """Find z = h + delta; delta minimises the mean of -log p(o | x_j + p(s, r)), plus KL and decay (Eq. 16)."""
        prompts = [self.ids(prefix + question, subject) for prefix in self.prefixes]
        essence, essence_place = self.ids(f"{subject} is a", subject)
        before = self.run(essence, essence_place)[0][essence_place]
        h = self.run(*prompts[0])[2]
        delta = torch.zeros_like(h, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.settings.learning_rate)
        for step in range(self.settings.gradient_steps):
            with torch.enable_grad():
                said = []
                for ids, place in prompts:
                    logp = self.run(ids + answer[:-1], place, delta)[0]
                    at = torch.arange(len(ids) - 1, len(ids) - 1 + len(answer))
                    said.append(logp[at, torch.tensor(answer)].mean())
                now = self.run(essence, essence_place, delta)[0][essence_place]
                # D_KL(P_edited || P_unedited): the edited model's distribution is the one that is averaged over
                kl = torch.distributions.kl_divergence(
                    torch.distributions.Categorical(logits=now), torch.distributions.Categorical(logits=before)
                )
                decay = self.settings.weight_decay * delta.norm() / h.norm() ** 2
                loss = -torch.stack(said).mean() + self.settings.kl_factor * kl + decay
            if loss < 0.05 or step == self.settings.gradient_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                bound = self.settings.clamp_norm_factor * h.norm()
                if delta.norm() > bound:
                    delta *= bound / delta.norm()
        return h + delta.detach()

    def key(self, question: str, subject: str, layer: int) -> Tensor:
        """Give k^l: half from the bare prompt, half the mean over the prefixes (authors' code; Eq. 19 has one mean)."""
        prompts = [self.ids(prefix + question, subject) for prefix in self.prefixes]
        keys = [self.run(ids, place)[1][layer][place] for ids, place in prompts]
        return (keys[0] + torch.stack(keys[1:]).mean(0)) / 2

    def solve(self, facts: Sequence[tuple[str, str, list[int]]], rows: Sequence[list[int]]) -> dict[int, Tensor]:
        """Algorithm 1: layer by layer, R^l = (z - h^L) / (L - l + 1), and W^l += `change`."""
        covariances = {layer: self.covariance(rows, layer) for layer in self.settings.layers}
        targets = [self.target(*fact) for fact in facts]
        changes = {}
        for number, layer in enumerate(self.settings.layers):
            remaining = len(self.settings.layers) - number
            keys = torch.stack([self.key(question, subject, layer) for question, subject, _ in facts], dim=1)
            now = [self.run(*self.ids(question, subject))[2] for question, subject, _ in facts]
            residual = torch.stack([(z - h) / remaining for z, h in zip(targets, now, strict=True)], dim=1)
            changes[layer] = self.change(layer, covariances[layer], keys, residual)
            self.model.model.layers[layer].mlp.down_proj.weight.data += changes[layer]
        return changes

    def change(self, layer: int, covariance: Tensor, keys: Tensor, residual: Tensor) -> Tensor:
        """R K^T (lambda C + K K^T)^-1 (Eq. 14)."""
        assert isinstance(self.settings, Settings)
        return residual @ keys.T @ torch.linalg.inv(self.settings.weight * covariance + keys @ keys.T)

    def covariance(self, rows: Sequence[list[int]], layer: int) -> Tensor:
        """C^l = E[k k^T] over all tokens of the texts."""
        keys = [key for row in rows for key in self.run(row, 0)[1][layer]]
        return torch.stack([torch.outer(key, key) for key in keys]).mean(0)


class AlphaReference(Reference):
    """AlphaEdit, literally and in numpy. A second call of `solve` is a second round, on the changed weights."""

    def __init__(self, model: Any, tokenizer: Any, settings: AlphaEditSettings) -> None:
        super().__init__(model, tokenizer, (), settings)
        self.known: dict[int, np.ndarray] = {}  # K_p
        self.unedited: dict[int, Tensor] = {}  # the key statistics of the model before any round

    def covariance(self, rows: Sequence[list[int]], layer: int) -> Tensor:
        """C^l of the unedited model."""
        if layer not in self.unedited:
            self.unedited[layer] = super().covariance(rows, layer)
        return self.unedited[layer]

    def change(self, layer: int, covariance: Tensor, keys: Tensor, residual: Tensor) -> Tensor:
        """R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1 (Eq. 14), P from the singular vectors below the threshold."""
        assert isinstance(self.settings, AlphaEditSettings)
        k, r = keys.numpy(), residual.numpy()
        u, s, _ = np.linalg.svd(covariance.numpy())
        free = u[:, s < self.settings.threshold]
        p = free @ free.T
        known = self.known.get(layer, np.zeros((len(k), 0)))
        right = known @ known.T @ p + k @ k.T @ p + self.settings.l2 * np.eye(len(k))
        return torch.from_numpy(r @ k.T @ p @ np.linalg.inv(right))

    def sample(self, seed: int) -> None:
        """Draw the prefixes of a round."""
        settings = self.settings
        texts = sample_prefixes(self.model, self.tokenizer, settings.prefixes, settings.prefix_tokens, seed)
        self.prefixes = ["", *(f"{text}. " for text in texts)]

    def remember(self, facts: Sequence[tuple[str, str, list[int]]]) -> None:
        """Add the keys of a round's edits, in the model after it, to K_p."""
        for layer in self.settings.layers:
            keys = np.stack([self.key(question, subject, layer).numpy() for question, subject, _ in facts], axis=1)
            self.known[layer] = np.concatenate([self.known.get(layer, keys[:, :0]), keys], axis=1)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, 1000, (6,), generator=generator).tolist() for _ in range(24)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_memit_is_the_papers(family: str, encoder: Encoder) -> None:
    model, tokenizer = model_of(family), encoder.tokenizer
    edits = [
        Edit.build(id=str(i), prompt=question, subject=subject, target_new=new, target_old="x")
        for i, (question, subject, new) in enumerate(FACTS)
    ]
    statistics = KeyStatistics.empty(model, SETTINGS.layers)
    statistics.add(model, texts())
    found, measured = memit(model, encoder, edits, statistics, SETTINGS, seed=SEED)

    with torch.no_grad():
        prefixes = sample_prefixes(model, tokenizer, SETTINGS.prefixes, SETTINGS.prefix_tokens, SEED)
        assert len(set(prefixes)) == SETTINGS.prefixes
        reference = Reference(model, tokenizer, prefixes, SETTINGS)
        answers = [[*tokenizer(f" {new}")["input_ids"], tokenizer.eos_token_id] for _, _, new in FACTS]
        facts = [(question, subject, answer) for (question, subject, _), answer in zip(FACTS, answers, strict=True)]
        expected = reference.solve(facts, texts())
    for layer, change in expected.items():
        mine = found[f"model.layers.{layer}.mlp.down_proj"].double()
        assert (mine - change).norm() <= 1e-5 * change.norm()
    assert measured["reached"] > 0.2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_two_rounds_of_alphaedit_are_the_papers(family: str, encoder: Encoder) -> None:
    """The second round revises one fact of the first."""
    model, tokenizer = model_of(family), encoder.tokenizer
    statistics = KeyStatistics.empty(model, SETTINGS.layers)
    statistics.add(model, texts())
    middle = [float(torch.linalg.eigvalsh(statistics.mean(layer)).median()) for layer in SETTINGS.layers]
    shared = {name: value for name, value in vars(SETTINGS).items() if name != "weight"}
    settings = AlphaEditSettings(**shared, threshold=sum(middle) / len(middle), l2=0.05)  # half of the directions
    reference = AlphaReference(model, tokenizer, settings)
    before: dict[int, Tensor] = {}
    so_far: dict[str, Tensor] = {}
    for number, facts in enumerate([FACTS[:2], [FACTS[2], ("Who leads Norway?", "Norway", "Olaf Lund")]]):
        edits = [
            Edit.build(id=str(i), prompt=question, subject=subject, target_new=new, target_old="x")
            for i, (question, subject, new) in enumerate(facts)
        ]
        with attached(model, so_far):
            written = alphaedit(model, encoder, edits, statistics, before, settings, seed=SEED)
        with torch.no_grad():
            reference.sample(SEED)
            answers = [[*tokenizer(f" {new}")["input_ids"], tokenizer.eos_token_id] for _, _, new in facts]
            taught = [
                (question, subject, answer) for (question, subject, _), answer in zip(facts, answers, strict=True)
            ]
            expected = reference.solve(taught, texts())
            reference.remember(taught)
        for layer, change in expected.items():
            name = f"model.layers.{layer}.mlp.down_proj"
            assert (written.delta[name].double() - change).norm() <= 1e-5 * change.norm(), number
            before[layer] = torch.cat([before.get(layer, written.keys[layer][:, :0]), written.keys[layer]], dim=1)
            known = torch.from_numpy(reference.known[layer])
            assert (before[layer].double() - known).norm() <= 1e-5 * known.norm()
            so_far[name] = so_far[name] + written.delta[name] if name in so_far else written.delta[name]
        assert 0.3 < written.metrics["free"] < 0.7
        assert written.metrics["reached"] > 0.1


@pytest.mark.parametrize("family", ["llama"])
def test_every_part_of_the_loss_counts_in_the_comparison(family: str, encoder: Encoder) -> None:
    """A reference that does not depend on a term could not test it."""
    model = model_of(family)
    targets = []
    for change in ({}, {"kl_factor": 0.0}, {"weight_decay": 0.0}, {"clamp_norm_factor": 9.0}):
        settings = Settings(**{**vars(SETTINGS), **change})
        with torch.no_grad():
            reference = Reference(model, encoder.tokenizer, ["Because of it"], settings)
            question, subject, new = FACTS[0]
            targets.append(reference.target(question, subject, encoder.answer(new)))
    for other in targets[1:]:
        assert (other - targets[0]).norm() > 1e-3 * targets[0].norm()
