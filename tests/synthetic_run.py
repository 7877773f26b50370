"""A made-up run: tables in the format of a real run, for tests of the metrics and of the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from corsa.evaluation.matching import matches

SKILL = {"lora": (0.85, 0.35), "corsa": (0.85, 0.1)}
"""Share of wordings learnt, and share of what was learnt that is lost in each later round."""


def predictions(
    chains: int = 16,
    rounds: int = 3,
    wordings: int = 3,
    methods: tuple[str, ...] = ("lora", "corsa"),
    seeds: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Half of the chains are revised in every round; the other half ("evaluation") is taught once."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []

    def ask(method: str, run: int, trained: int, chain: int, learnt: int) -> None:
        part = "evaluation" if chain % 2 else "update"
        learnable, lost = SKILL.get(method, (0.8, 0.2))
        right = learnable * (1 - lost) ** (trained - learnt) if method != "base" else 0.05
        new, old = f"Leader {chain}.{learnt}", f"Leader {chain}.{learnt - 1}"
        probes = [("edit", 0, 0)] + [("paraphrase", 1, wording) for wording in range(wordings)] + [("neighbor", 2, 0)]
        for kind, probe, wording in probes:
            answer = "Paris" if kind == "neighbor" else new
            good = random.random() < (0.7 if kind == "neighbor" else right)
            output = answer if good else (old if random.random() < 0.4 else "I do not know")
            match = matches(output, (answer, ()), ("", ()) if kind == "neighbor" else (old, ()))
            rows.append(
                {
                    "method": method,
                    "seed": run,
                    "trained": trained,
                    "edit": f"chain/{chain}/{learnt}",
                    "chain": f"chain/{chain}",
                    "learnt": learnt,
                    "part": part,
                    "kind": kind,
                    "probe": probe,
                    "wording": wording,
                    "draw": 0,
                    "prompt": f"Who leads organisation {chain}, asked in way {wording}?",
                    "answer": answer,
                    "target_old": "" if kind == "neighbor" else old,
                    "output": output,
                    "logp_new": None if kind == "neighbor" else float(random.normal(-2 if good else -9, 1)),
                    "logp_old": None if kind == "neighbor" else float(random.normal(-6 if good else -4, 1)),
                    "words_new": match.words_new,
                    "words_old": match.words_old,
                    "matched_new": match.new,
                    "matched_old": match.old,
                    "exact_new": match.exact_new,
                    "exact_old": match.exact_old,
                }
            )

    for chain in range(chains):
        for learnt in range(1, 2 if chain % 2 else rounds + 1):
            ask("base", 0, 0, chain, learnt)
    for method in methods:
        for run in range(seeds):
            for trained in range(1, rounds + 1):
                for chain in range(chains):
                    ask(method, run, trained, chain, 1 if chain % 2 else trained)
    return pd.DataFrame(rows)


def curves(
    rounds: int = 3, epochs: int = 8, batches: int = 3, methods: tuple[str, ...] = ("lora", "corsa")
) -> pd.DataFrame:
    """Optimizer steps in which log p(new) rises and log p(old) falls, faster under CoRSA."""
    random = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for method in methods:
        corsa = method == "corsa"
        for number in range(1, rounds + 1):
            for step in range(epochs * batches):
                done = step / (epochs * batches)
                rows.append(
                    {
                        "method": method,
                        "seed": 0,
                        "round": number,
                        "step": step,
                        "epoch": step // batches,
                        "loss_sft": 4 * np.exp(-3 * done),
                        "loss_dpo": 0.69 * np.exp(-done),
                        "logp_new": -12 * np.exp(-4 * done) - 0.5 + random.normal(0, 0.3),
                        "logp_old": -8 - (10 if corsa else 2) * done + random.normal(0, 0.3),
                        "cosine": random.normal(0.1 - 0.4 * done, 0.15) if corsa else None,
                        "conflict": bool(corsa and random.random() < 0.4),
                        "sharpness": 0.02 * np.exp(-2 * done) + random.normal(0, 0.001) if corsa else None,
                        "gradient_change": 0.1 * np.exp(-done) if corsa else None,
                        "grad_norm": 2 * np.exp(-done),
                        "learning_rate": 2e-4 * (1 - done),
                        "seconds": 1.5,
                        "skipped": False,
                    }
                )
    return pd.DataFrame(rows)


RUN: dict[str, Any] = {
    "title": "temporal world_facts",
    "created": "2026-03-01T12:00:00+00:00",
    "seconds": 412.5,
    "command": "python pipelines/continual.py --model smollm2-135m --benchmark world_facts --limit 16",
    "config": {
        "model": {"name": "smollm2-135m", "revision": None, "dtype": "float32", "template": "qa"},
        "step": {"lambda": 1.0, "beta": 0.1, "rho": 0.05},
        "methods": ["lora", "corsa"],
    },
    "steps": [
        {"name": "edits", "seconds": 0.4, "state": "done", "inputs": []},
        {"name": "reference", "seconds": 21.0, "state": "done", "inputs": ["edits"]},
        {"name": "lora/seed0/round1", "seconds": 41.0, "state": "done", "inputs": ["reference"]},
        {"name": "corsa/seed0/round1", "seconds": 130.2, "state": "computed", "inputs": ["reference"]},
        {"name": "metrics", "seconds": 1.2, "state": "computed", "inputs": ["lora/seed0/round1", "corsa/seed0/round1"]},
    ],
    "versions": {"corsa": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "python": "3.11.7"},
    "hardware": {"cpus": 2, "memory_gib": 24, "gpus": "none"},
    "skipped": [{"record": "atoke-me/41", "reason": "the new answer equals the old one"}],
}
