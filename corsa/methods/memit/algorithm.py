"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer"): the edits of a round written into a few MLP layers.

For every edit a residual z at the subject's last token is found by gradient that makes the model say the new answer
(Eq. 16); the down projections of the chosen layers are then changed, in closed form and for all edits at once, so that
the residual becomes z while what the layers are used for otherwise stays (Eq. 14, 15, 20).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corsa.config import MemitConfig
from corsa.data.edit import Edit
from corsa.errors import CorsaError
from corsa.lora.attached import attached
from corsa.methods.memit.key_statistics import KeyStatistics, down_projections, watch
from corsa.models.encoding import Encoder

LAYERS: dict[tuple[str, int], tuple[int, ...]] = {
    ("llama", 16): (4, 5, 6, 7, 8),  # Llama-3.2-1B, EasyEdit
    ("llama", 28): (4, 5, 6, 7, 8),  # Llama-3.2-3B, EasyEdit
    ("llama", 32): (4, 5, 6, 7, 8),  # Llama-2-7B, EasyEdit; Llama-3-8B, AlphaEdit
    ("qwen2", 28): (4, 5, 6, 7, 8),  # Qwen2-7B and Qwen2.5-7B, EasyEdit
}
"""Published layers by (model type, number of layers). The edited weight is that of `mlp.down_proj` in all of them."""

WINDOW_LAYERS = 5
"""How many layers are edited in a model that is not in the table; the last of them is at a quarter of the depth."""

LOSS_REACHED = 0.05
"""An edit's search ends when its loss is below this (published code)."""

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""What the sampled prefixes begin with (published code)."""

ROWS = 64
"""Token rows of one forward pass without gradients."""

Post = Callable[[dict[str, Any]], None]
"""Takes a line for the progress display."""


def layers_for(architecture: Any, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers that MEMIT edits, in ascending order: `chosen`, else the published ones (`LAYERS`), else five layers
    that end at a quarter of the depth (for 32 layers the published 4 to 8).

    Args:
        architecture: configuration of the model (transformers).
        chosen: numbers of layers, from 0.

    Raises:
        CorsaError: a chosen layer does not exist.
    """
    text = architecture.get_text_config()
    depth = text.num_hidden_layers
    if chosen is not None:
        if strange := [layer for layer in chosen if not 0 <= layer < depth]:
            raise CorsaError(
                f"layer {strange[0]} to be edited by MEMIT does not exist: the model has layers 0 to {depth - 1}; "
                "correct --memit.layers, or leave it out"
            )
        return tuple(sorted(set(chosen)))
    last = round(depth / 4)
    window = tuple(range(max(last - WINDOW_LAYERS + 1, 0), last + 1))
    return LAYERS.get((text.model_type, depth), window)


class Wording(NamedTuple):
    """One way an edit's question is put: token ids, and where among them the subject ends."""

    prompt: list[int]
    subject: int


@dataclass(frozen=True)
class Request:
    """An edit as MEMIT takes it.

    Attributes:
        wordings: the question as it is asked, and then behind each prefix.
        essence: "{subject} is a", up to the end of the subject; empty for an edit without a subject.
        answer: token ids of the new answer with the end token, which is learnt like the others.
        located: whether the question names the subject; else its last token stands in for the subject's.
    """

    wordings: list[Wording]
    essence: list[int]
    answer: list[int]
    located: bool


def last_subject_token(encoder: Encoder, prompt: Sequence[int], subject: str) -> int | None:
    """Position in `prompt` of the token with which `subject` ends, where it occurs last; None if it does not occur.

    It is looked for in the decoded text, so any template will do; a whole word is preferred to a part of one.
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
    # a character of several tokens is only there, unbroken, with the last of them: compare texts and not lengths
    return next(i for i in range(len(prompt)) if decode(prompt[: i + 1])[:end] == text[:end])


def request(encoder: Encoder, edit: Edit, prefixes: Sequence[str]) -> Request:
    """The edit in token ids. A prefix is a sentence of its own before the question, inside the template."""
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
    """Texts of at most `tokens` tokens from the model itself, drawn among the five likeliest next tokens, so that what
    is learnt does not hang on how a prompt begins. They follow from the model and the seed.
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
    """What was found for an edit: the residual z (hidden,) float32, and -log p of the new answer with it (nats a token,
    mean over the wordings).
    """

    z: Tensor
    loss: float


def find_target(model: Any, wanted: Request, layer: int, config: MemitConfig) -> Target:
    """The target z = h + delta at the end of the subject in the output of `layer`, with delta found by Adam (Eq. 16).

    The loss is that of the published code: -log p of the new answer (mean over its tokens and over the wordings), plus
    `kl_factor` times KL of the next-token distribution at the subject's end in the essence prompt to what it was, plus
    `weight_decay` |delta| / |h|^2; |delta| is kept within `clamp_norm_factor` |h|.
    """
    answer, asked = wanted.answer, len(wanted.wordings)
    rows = [w.prompt + answer[:-1] for w in wanted.wordings] + ([wanted.essence] if wanted.essence else [])
    width = max(map(len, rows))  # padded on the left: every row's last tokens are those whose logits are needed
    padding = [width - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=model.device)
    ends = [w.subject for w in wanted.wordings] + ([len(wanted.essence) - 1] if wanted.essence else [])
    places = torch.tensor([pad + end for pad, end in zip(padding, ends, strict=True)], device=model.device)
    answers = torch.tensor(answer, device=model.device).expand(asked, -1)[..., None]  # (W, m, 1)

    delta = torch.zeros(model.get_decoder().config.hidden_size, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.learning_rate)
    h = essence_before = torch.empty(0)
    for step in range(config.gradient_steps):
        with _added(model.get_decoder().layers[layer], places, delta) as unchanged, torch.enable_grad():
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=len(answer),
                use_cache=False,
            ).logits
        logp = logits.float().log_softmax(-1)  # (W or W + 1, m, V)
        essence = logp[asked:, -1]
        if step == 0:
            h, essence_before = unchanged[0][0].detach().float(), essence.detach()
        new = -logp[:asked].gather(-1, answers).mean()
        kl = (essence.exp() * (essence - essence_before)).sum()
        loss = new + config.kl_factor * kl + config.weight_decay * delta.norm() / h.norm() ** 2
        if loss < LOSS_REACHED or step == config.gradient_steps - 1:
            return Target(h + delta.detach(), new.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta.mul_((config.clamp_norm_factor * h.norm() / delta.norm()).clamp(max=1.0))
    raise AssertionError("unreachable: the last step returns")


@contextmanager
def _added(layer: nn.Module, places: Tensor, delta: Tensor) -> Iterator[list[Tensor]]:
    """Add `delta` to the output of `layer` at `places` (R,), one of each row; gives what stood there, (R, hidden)."""
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


def closed_form(mean: Tensor, keys: Tensor, residuals: Tensor, weight: float) -> Tensor:
    """Delta = R K^T (lambda C + K K^T)^-1 (Eq. 14, 15), in float64.

    Args:
        mean: C = E[k k^T], (inputs, inputs).
        keys: K, (inputs, E).
        residuals: R, (outputs, E): what the layer shall give beyond what it gives.
        weight: lambda.

    Returns:
        Delta (outputs, inputs), float64.
    """
    keys, residuals = keys.double(), residuals.double()
    both = weight * mean.double() + keys @ keys.mT
    return torch.cholesky_solve(keys @ residuals.mT, torch.linalg.cholesky(both)).mT


def memit(
    model: Any,
    encoder: Encoder,
    edits: Sequence[Edit],
    statistics: KeyStatistics,
    config: MemitConfig,
    *,
    seed: int,
    post: Post = lambda line: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The change of the down projections that makes all `edits` at once. The model is left as it was, bit for bit.

    Args:
        model: causal language model of the Llama, Qwen3 or Gemma kind, frozen.
        encoder: how it is asked.
        edits: what it shall say.
        statistics: of the layers to be edited (`layers_for(model.config, config.layers)`).
        config: settings.
        seed: of the sampled prefixes.
        post: shows progress: step, steps (edits) and loss.

    Returns:
        The delta: module name -> (outputs, inputs) float32, on the CPU. And what was measured: `edits`;
        `without_subject`, edits whose prompt does not name their subject, so that its last token stood in for it;
        `target_loss`, -log p of the new answers with the residuals z put in place (nats a token); `reached`, how much
        of the way from h to z the changed weights go (mean over edits).

    Raises:
        CorsaError: a layer does not exist, or the statistics cannot be solved with.
    """
    layers = layers_for(model.config, config.layers)
    statistics.check(layers)
    prefixes = sample_prefixes(model, encoder.tokenizer, config.prefixes, config.prefix_tokens, seed)
    requests = [request(encoder, edit, prefixes) for edit in edits]
    targets: list[Target] = []
    for number, wanted in enumerate(requests, 1):
        targets.append(find_target(model, wanted, layers[-1], config))
        post({"phase": "training", "step": number, "steps": len(requests), "loss": targets[-1].loss})

    z = torch.stack([target.z for target in targets])  # (E, hidden)
    delta: dict[str, Tensor] = {}
    ways: list[Tensor] = []  # |z - h|, before each layer's change and after the last one's
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            now = _at_subjects(model, requests, layer, layers[-1])
            ways.append((z - now.residual).norm(dim=1))
            residuals = (z - now.residual) / (len(layers) - i)  # Eq. 20
            if now.scale is not None:
                residuals = residuals / now.scale
            mean = statistics.mean(layer).to(model.device)
            change = closed_form(mean, now.keys.mT, residuals.mT, config.weight).float()
            name = down_projections(model)[layer][0]
            delta[name] = change.cpu()
            stack.enter_context(attached(model, {name: change}))  # the next layer's keys see it
        ways.append((z - _at_subjects(model, requests, layers[-1], layers[-1]).residual).norm(dim=1))
    measured = {
        "edits": len(edits),
        "without_subject": sum(not wanted.located for wanted in requests),
        "target_loss": sum(target.loss for target in targets) / len(targets),
        "reached": float((1 - ways[-1] / ways[0]).mean()),
    }
    return delta, measured


class _Subjects(NamedTuple):
    """What a layer holds at the subjects' ends: keys (E, inputs), averaged over the wordings; for the question itself
    the residual (E, hidden) of the last edited layer, and by what the layer multiplies its down projection's outputs
    (E, hidden), if it does.
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
    # The published code averages over the prefixes, and then over that mean and the question without one.
    plain, prefixed = keys[:, 0], keys[:, 1:]
    mean = (plain + prefixed.mean(1)) / 2 if prefixed.shape[1] else plain
    # An RMS norm multiplies by weight / rms, so what shall be added behind it is divided by that before it. To first
    # order: the change of the rms itself is left to the layers that follow, whose residuals are measured anew.
    scale = normed[0][:, 0] / outputs[:, 0] if normed else None
    return _Subjects(mean, residuals[:, 0], scale)
