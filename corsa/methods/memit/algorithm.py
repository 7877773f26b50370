"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer"): writes the edits of a round into a few MLP layers.

For each edit, gradient descent finds a residual z at the subject's last token with which the model gives the new answer
(Eq. 16). Then the down projections of the chosen layers are changed, in closed form and for all edits at once, so that
the residual becomes z while the layers' outputs for other keys are preserved (Eq. 14, 15, 20).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from corsa.data.edit import Edit
from corsa.evaluation.prefix_cache import padded, window
from corsa.lora.attached import attached
from corsa.methods.memit.key_statistics import KeyStatistics, down_projections, watch
from corsa.methods.memit.settings import EditSettings, Settings
from corsa.models.encoding import Encoder

LOSS_REACHED = 0.05
"""An edit's search ends when its loss is below this (published code)."""

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""First words of the sampled prefixes (published code)."""

ROWS = 64
"""Token rows of one forward pass without gradients."""

Post = Callable[[dict[str, Any]], None]
"""Takes a line for the progress display."""


class Wording(NamedTuple):
    """One wording of an edit's question: its token ids, and the position of the subject's last token."""

    prompt: list[int]
    subject: int


@dataclass(frozen=True)
class Request:
    """An edit in the form that MEMIT needs.

    Attributes:
        wordings: the question alone, and then after each prefix.
        essence: "{subject} is a", up to the end of the subject; empty for an edit without a subject.
        answer: token ids of the new answer, with the end token, which is learnt like the others.
        located: whether the question names the subject; if not, its last token replaces the subject's.
    """

    wordings: list[Wording]
    essence: list[int]
    answer: list[int]
    located: bool


def last_subject_token(encoder: Encoder, prompt: Sequence[int], subject: str) -> int | None:
    """Position in `prompt` of the last token of the last occurrence of `subject`; None if it does not occur.

    Searches the decoded text, so any template works. Prefers a whole word to a part of a word.
    """
    if not subject.strip():
        return None
    decode = encoder.tokenizer.decode
    text, wanted = decode(prompt), re.escape(subject.strip())
    word = rf"(?<!\w){wanted}(?!\w)"
    found = [*re.finditer(word, text, re.IGNORECASE)] or [*re.finditer(wanted, text, re.IGNORECASE)]
    if not found:
        return None
    end = found[-1].end()
    # a character of several tokens decodes correctly only with its last token: compare texts and not lengths
    return next(i for i in range(len(prompt)) if decode(prompt[: i + 1])[:end] == text[:end])


def request(encoder: Encoder, edit: Edit, prefixes: Sequence[str]) -> Request:
    """The edit as token ids. A prefix is a separate sentence before the question, inside the template."""
    wordings, located = [], True
    for question in (edit.prompt, *(f"{prefix}. {edit.prompt}" for prefix in prefixes)):
        prompt = encoder.prompt(question)
        place = last_subject_token(encoder, prompt, edit.subject)
        located = located and place is not None
        wordings.append(Wording(prompt, len(prompt) - 1 if place is None else place))
    essence: list[int] = []
    if edit.subject.strip():
        prompt = encoder.prompt(f"{edit.subject} is a")
        place = last_subject_token(encoder, prompt, edit.subject)
        essence = prompt if place is None else prompt[: place + 1]
    return Request(wordings, essence, encoder.answer(edit.target_new), located)


@torch.no_grad()
def sample_prefixes(model: Any, tokenizer: Any, count: int, tokens: int, seed: int) -> list[str]:
    """Texts of at most `tokens` sampled tokens each, drawn by the model among its five likeliest next tokens. With
    them, an edit does not depend on the start of the prompt. The texts depend only on the model and the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(count):
        ids = tokenizer(OPENINGS[i % len(OPENINGS)])["input_ids"]
        for _ in range(tokens):
            row = torch.tensor([ids], device=model.device)
            likeliest = model(input_ids=row, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu().topk(5)
            drawn = torch.multinomial(likeliest.values.softmax(0), 1, generator=generator)
            ids = [*ids, int(likeliest.indices[drawn])]
        texts.append(" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()))
    return texts


class Target(NamedTuple):
    """The target of an edit: the residual z (hidden,) float32; -log p of the new answer with it (nats per token, mean
    over the wordings); and whether z differs from h (not if the model already gives the answer).
    """

    z: Tensor
    loss: float
    moved: bool


def find_target(model: Any, wanted: Request, layer: int, settings: EditSettings) -> Target:
    """The target z = h + delta at the end of the subject in the output of `layer`, with delta found by Adam (Eq. 16).

    The loss is that of the published code: -log p of the new answer (mean over its tokens and over the wordings), plus
    `kl_factor` times KL(p || p_old) of the next-token distribution at the subject's end in the essence prompt, where
    p_old is the unedited model's, plus `weight_decay` |delta| / |h|^2; |delta| is kept within `clamp_norm_factor` |h|.
    """
    answer, asked = wanted.answer, len(wanted.wordings)
    rows = [w.prompt + answer[:-1] for w in wanted.wordings] + ([wanted.essence] if wanted.essence else [])
    ends = [w.subject for w in wanted.wordings] + ([len(wanted.essence) - 1] if wanted.essence else [])
    begun = _begun(model, rows, ends)
    answers = torch.tensor(answer, device=model.device).expand(asked, -1)[..., None]  # (W, m, 1)

    delta = torch.zeros(model.get_decoder().config.hidden_size, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    h = essence_before = torch.empty(0)
    for step in range(settings.gradient_steps):
        with _added(model.get_decoder().layers[layer], begun.places, delta) as unchanged, torch.enable_grad():
            logits = begun.logits(model, len(answer))
        logp = logits.float().log_softmax(-1)  # (W or W + 1, m, V)
        essence = logp[asked:, -1]
        if step == 0:
            h, essence_before = unchanged[0][0].detach().float(), essence.detach()
        new = -logp[:asked].gather(-1, answers).mean()
        kl = (essence.exp() * (essence - essence_before)).sum()
        loss = new + settings.kl_factor * kl + settings.weight_decay * delta.norm() / h.norm() ** 2
        if loss < LOSS_REACHED or step == settings.gradient_steps - 1:
            return Target(h + delta.detach(), new.item(), bool(delta.any()))
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta.mul_((settings.clamp_norm_factor * h.norm() / delta.norm()).clamp(max=1.0))
    raise AssertionError("unreachable: the last step returns")


@dataclass(frozen=True)
class _Begun:
    """Prompts whose tokens before the changed place have been computed: no change reaches them.

    Attributes:
        keys_and_values: of these tokens, of each layer; none if nothing was computed before.
        ids: the other tokens, (R, T), padded on the left: the logits that are needed are those of the last ones.
        seen: which positions hold tokens, of those before and then of `ids`, (R, P + T).
        places: the changed place of each row in `ids`, (R,).
    """

    keys_and_values: list[tuple[Tensor, Tensor]]
    ids: Tensor
    seen: Tensor
    places: Tensor

    def logits(self, model: Any, last: int) -> Tensor:
        """The logits (R, last, V) at the last tokens of each row."""
        cache = None
        if self.keys_and_values:
            cache = DynamicCache(config=model.config)
            for layer, (keys, values) in enumerate(self.keys_and_values):
                cache.update(keys, values, layer)
        return model(
            input_ids=self.ids,
            attention_mask=self.seen,
            position_ids=(self.seen.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=last,
        ).logits


@torch.no_grad()
def _begun(model: Any, rows: Sequence[list[int]], ends: Sequence[int]) -> _Begun:
    """Computes the tokens of each row before `ends` once, for all steps of the search."""
    longest = max(ends) + max(len(row) - end for row, end in zip(rows, ends, strict=True))
    starts = ends if any(ends) and longest <= window(model) else [0] * len(rows)
    ids, seen = padded([row[start:] for row, start in zip(rows, starts, strict=True)], model.device)
    places = [ids.shape[1] - (len(row) - end) for row, end in zip(rows, ends, strict=True)]
    begun = _Begun([], ids, seen, torch.tensor(places, device=model.device))
    if not any(starts):
        return begun
    ids, before = padded([row[:start] for row, start in zip(rows, starts, strict=True)], model.device)
    cache = DynamicCache(config=model.config)
    model(
        input_ids=ids,
        attention_mask=before,
        position_ids=(before.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        logits_to_keep=1,
        use_cache=True,
    )
    layers: Any = cache.layers
    known = [(layer.keys, layer.values) for layer in layers]
    return replace(begun, keys_and_values=known, seen=torch.cat([before, seen], dim=1))


@contextmanager
def _added(layer: nn.Module, places: Tensor, delta: Tensor) -> Iterator[list[Tensor]]:
    """Add `delta` to the output of `layer` at `places` (R,), one per row; yields the values before, (R, hidden)."""
    unchanged: list[Tensor] = []

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = torch.arange(len(places), device=output.device)
        unchanged.append(output[rows, places])
        change = delta.to(output.dtype).expand(len(places), -1)
        return output.index_put((rows, places), change, accumulate=True)

    hook = layer.register_forward_hook(add)
    try:
        yield unchanged
    finally:
        hook.remove()


def closed_form(cost: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
    """Delta = R K^T (S + K K^T)^-1, in float64: it minimises |Delta K - R|^2 + tr(Delta S Delta^T).

    Args:
        cost: S (inputs, inputs), positive definite: the cost of a change. MEMIT's is lambda C (Eq. 14, 15).
        keys: K, (inputs, E).
        residuals: R, (outputs, E): what to add to the layer's outputs.

    Returns:
        Delta (outputs, inputs), float64.
    """
    keys, residuals = keys.double(), residuals.double()
    both = cost.double() + keys @ keys.mT
    return torch.cholesky_solve(keys @ residuals.mT, torch.linalg.cholesky(both)).mT


def memit(
    model: Any,
    encoder: Encoder,
    edits: Sequence[Edit],
    statistics: KeyStatistics,
    settings: Settings,
    *,
    seed: int,
    post: Post = lambda line: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The change of the down projections for all `edits` at once, and its metrics (`write`, and the `weight`).

    Raises:
        CorsaError: the solve is not possible with these statistics.
    """
    statistics.check(settings.layers)

    def solve(layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        return closed_form(settings.weight * statistics.mean(layer).to(keys.device), keys, residuals)

    written = write(model, encoder, edits, solve, settings, seed=seed, post=post)
    return written.delta, {"weight": settings.weight, **written.metrics}


Solve = Callable[[int, Tensor, Tensor], Tensor]
"""Delta (outputs, inputs) of a layer from its number, the keys K (inputs, E) and the residuals R (outputs, E)."""


class Written(NamedTuple):
    """The result of `write`.

    Attributes:
        delta: module name -> (outputs, inputs) float32, on the CPU.
        keys: layer -> (inputs, E) float32, on the CPU: the keys of the edits in the changed model.
        metrics: `edits`; `without_subject`, edits whose prompt does not name their subject, so that its last token was
            used instead; `target_loss`, -log p of the new answers with the residuals z (nats per token); `reached`, the
            share of the distance from h to z that the changed weights cover (mean over the edits whose z is not h; None
            without any); `clamp_norm_factor`, `weight_decay` and `layers` as used, and the `source` of settings not
            configured.
    """

    delta: dict[str, Tensor]
    keys: dict[int, Tensor]
    metrics: dict[str, Any]


def write(
    model: Any,
    encoder: Encoder,
    edits: Sequence[Edit],
    solve: Solve,
    settings: EditSettings,
    *,
    seed: int,
    post: Post = lambda line: None,
) -> Written:
    """Finds the targets of all `edits`, and changes the layers by `solve`, one after the other (MEMIT, Algorithm 1).

    The model itself is unchanged, bit for bit.

    Args:
        model: frozen causal language model with the architecture of Llama, Qwen3 or Gemma.
        encoder: makes its prompts and answers.
        edits: the edits to write.
        solve: the change of one layer.
        settings: for the model.
        seed: for the sampled prefixes.
        post: shows progress: step, steps (edits) and loss.
    """
    layers = settings.layers
    prefixes = sample_prefixes(model, encoder.tokenizer, settings.prefixes, settings.prefix_tokens, seed)
    requests = [request(encoder, edit, prefixes) for edit in edits]
    targets: list[Target] = []
    for number, wanted in enumerate(requests, 1):
        targets.append(find_target(model, wanted, layers[-1], settings))
        post({"phase": "training", "step": number, "steps": len(requests), "loss": targets[-1].loss})

    z = torch.stack([target.z for target in targets])  # (E, hidden)
    delta: dict[str, Tensor] = {}
    keys: dict[int, Tensor] = {}
    ways: list[Tensor] = []  # |z - h|, before the change of each layer and after the last change
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            now = _at_subjects(model, requests, layer, layers[-1])
            ways.append((z - now.residual).norm(dim=1))
            residuals = (z - now.residual) / (len(layers) - i)  # Eq. 20
            if now.scale is not None:
                residuals = residuals / now.scale
            change = solve(layer, now.keys.mT, residuals.mT).float()
            name = down_projections(model)[layer][0]
            # No later change affects the inputs of this layer, so these keys are those of the changed model.
            delta[name], keys[layer] = change.cpu(), now.keys.mT.cpu()
            stack.enter_context(attached(model, {name: change}))  # it affects the next layer's keys
        ways.append((z - _at_subjects(model, requests, layers[-1], layers[-1]).residual).norm(dim=1))
    moved = torch.tensor([target.moved for target in targets], device=z.device)
    measured = {
        **{name: getattr(settings, name) for name in ("clamp_norm_factor", "weight_decay", "source")},
        "layers": list(layers),
        "edits": len(edits),
        "without_subject": sum(not wanted.located for wanted in requests),
        "target_loss": sum(target.loss for target in targets) / len(targets),
        "reached": float((1 - ways[-1][moved] / ways[0][moved]).mean()) if moved.any() else None,
    }
    return Written(delta, keys, measured)


class _Subjects(NamedTuple):
    """Values of a layer at the subjects' last tokens: keys (E, inputs), averaged over the wordings; and, for the
    question without prefix, the residual (E, hidden) of the last edited layer and the factor (E, hidden) by which the
    layer scales its down projection's outputs (None if it does not).
    """

    keys: Tensor
    residual: Tensor
    scale: Tensor | None


def _at_subjects(model: Any, requests: Sequence[Request], layer: int, last: int) -> _Subjects:
    decoder_layers = model.get_decoder().layers
    modules = [down_projections(model)[layer][1], decoder_layers[last]]
    norm = getattr(decoder_layers[layer], "post_feedforward_layernorm", None)  # Gemma 2 and 3
    if norm is not None:
        modules.insert(1, norm)
    rows = [wording.prompt[: wording.subject + 1] for wanted in requests for wording in wanted.wordings]
    seen: list[list[Tensor]] = []  # per batch: keys, outputs of the down projection, (normed,) residuals
    for start in range(0, len(rows), ROWS):
        batch = rows[start : start + ROWS]
        every, ends = torch.arange(len(batch)), torch.tensor([len(row) - 1 for row in batch])
        watched = watch(model, modules, batch)
        kept = [watched[0][0], *(output for _, output in watched)]
        seen.append([t[every.to(t.device), ends.to(t.device)].float() for t in kept])
    columns = [torch.cat(parts).unflatten(0, (len(requests), -1)) for parts in zip(*seen, strict=True)]  # (E, W, .)
    keys, outputs, *normed, residuals = columns
    # The published code averages over the prefixes, and then averages this mean and the question without a prefix.
    plain, prefixed = keys[:, 0], keys[:, 1:]
    mean = (plain + prefixed.mean(1)) / 2 if prefixed.shape[1] else plain
    # An RMS norm multiplies by weight / rms, so a change after the norm is divided by this factor before it. This is
    # first order: it ignores the change of the rms. The next layers correct it, as their residuals are measured again.
    scale = normed[0][:, 0] / outputs[:, 0] if normed else None
    return _Subjects(mean, residuals[:, 0], scale)
