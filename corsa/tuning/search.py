"""Ray Tune runs the trials that the study suggests: how many at once, which are stopped early, what became of each.

Ray's own OptunaSearch tells a study of one trial at a time, asks its first points anew after every start and leaves the
running ones behind; a sweep that goes on needs its study to be the one memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from rich.console import Console

from corsa.evaluation.metrics import METRICS
from corsa.tuning.study import SweepStudy
from corsa.tuning.trials import Trials


class StudySearch(Searcher):
    """Suggests to Tune what the study asks for, up to `most` trials in all, `pack` of them as one trial of Tune."""

    def __init__(self, study: SweepStudy, trials: Trials, most: int, pack: int, console: Console) -> None:
        self._objectives = trials.config.objectives
        mode = "max" if METRICS[self._objectives[0]].better == "high" else "min"
        super().__init__(metric=self._objectives[0], mode=mode)
        self._study, self._trials, self._most, self._pack, self._console = study, trials, most, pack, console
        self._waiting = [(trial.number, study.setting(trial)) for trial in study.unfinished()]
        self._given: dict[str, list[tuple[int, dict[str, float]]]] = {}

    def suggest(self, trial_id: str) -> Any:
        chosen = [self._waiting.pop(0) for _ in range(min(self._pack, len(self._waiting)))]
        while len(chosen) < self._pack and len(self._study.trials) < self._most:
            if (trial := self._study.ask()) is None:
                break
            setting = self._study.setting(trial)
            self._study.note(trial.number, label=self._trials.label(setting), setting=setting)
            chosen.append((trial.number, setting))
        if not chosen:
            return Searcher.FINISHED
        self._given[trial_id] = chosen
        name = self._trials.label(chosen[0][1]) + f",and-{len(chosen) - 1}-more" * (len(chosen) > 1)
        for number, setting in chosen:
            self._say("running", number, self._trials.label(setting))
        return {"name": name, "trials": [[number, setting] for number, setting in chosen]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        for number, _ in self._given.get(trial_id, ()):
            self._score(number, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        results, chosen = json.loads((result or {}).get("results", "{}")), self._given.pop(trial_id, [])
        for number, setting in chosen:
            found, name = results.get(str(number)), self._trials.label(setting)
            if found is None and error:
                cause = "the trial's own process ended: it ran out of memory, or its node was lost"
                self._study.tell(number, TrialState.FAIL, failed=cause)
                self._say("failed", number, f"{name}: {cause}")
            elif found is None:
                self._score(number, result or {})  # Tune tells of the result that stopped it here alone
                epoch = (result or {}).get("epoch")
                total = (result or {}).get("time_total_s")
                seconds = total and total / len(chosen)
                self._study.tell(number, TrialState.PRUNED, stopped_at=epoch, seconds=seconds)
                self._say("stopped", number, f"{name}: after epoch {epoch}")
            elif "failed" in found:
                self._study.tell(number, TrialState.FAIL, **found)
                self._say("failed", number, f"{name}: {found['failed']}")
            else:
                values = [found["metrics"][metric]["value"] for metric in self._objectives]
                self._study.tell(number, TrialState.COMPLETE, values, **found)
                shown = ", ".join(f"{m} {v:.3f}" for m, v in zip(self._objectives, values, strict=True))
                self._say("done", number, f"{name}: {shown}  {found['seconds']:.1f} s")

    def _score(self, number: int, result: Mapping[str, Any]) -> None:
        score = result.get(f"scores/{number}", math.nan)  # Tune hands nested results on flat
        if math.isfinite(score):
            self._study.report(number, result["epoch"], score)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of it: Tune would keep it for a restore, and the study in the store is what a sweep goes on from."""
        return {}

    def __deepcopy__(self, memo: Any) -> StudySearch:
        return self

    def save(self, checkpoint_path: str) -> None:
        """The study is its own memory."""

    def restore(self, checkpoint_path: str) -> None:
        """The study is its own memory."""

    def _say(self, what: str, number: int, text: str) -> None:
        line = f"{what:<8} trial {number}  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def scheduler(kind: str, metric: str, rung: int, epochs: int) -> TrialScheduler:
    """What stops a poor trial, on scores no closer together than `rung` epochs."""
    mode = "max" if METRICS[metric].better == "high" else "min"
    how: dict[str, Any] = {"time_attr": "epoch", "metric": metric, "mode": mode, "grace_period": rung}
    if kind == "asha":
        return AsyncHyperBandScheduler(**how, max_t=max(epochs, rung) + 1, reduction_factor=2, stop_last_trials=False)
    if kind == "median":
        return MedianStoppingRule(**how, min_samples_required=3)
    return FIFOScheduler()


def search(
    study: SweepStudy,
    trials: Trials,
    *,
    most: int,
    at_once: int,
    pack: int,
    stops: TrialScheduler,
    folder: str,
    name: str,
    console: Console,
) -> None:
    """Run trials until the study has `most` that have ended. Nothing a trial does is raised."""

    def trial(config: Mapping[str, Any]) -> None:
        chosen = [(int(number), dict(setting)) for number, setting in config["trials"]]
        try:
            results = trials.perform(chosen, config["name"])
        except Exception as error:  # such as a storage that is gone: said of these trials, and the sweep goes on
            cause = f"{type(error).__name__}: {error}"
            results = {number: {"failed": cause, "seconds": None} for number, _ in chosen}
        metric = trials.config.objectives[0]
        values = [r["metrics"][metric]["value"] for r in results.values() if "failed" not in r]
        best = (max if METRICS[metric].better == "high" else min)(values, default=math.nan)
        epochs = trials.experiment.training.epochs * trials.config.rounds.rounds * len(trials.experiment.seeds)
        tune.report({metric: best, "epoch": epochs, "results": json.dumps(results)})

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its box of settings is printed whatever `verbose` says
    searcher = StudySearch(study, trials, most, pack, console)
    tuner = tune.Tuner(
        # Its workers ask for what they need, and it runs nothing else that needs a CPU. Tune wants something to place.
        tune.with_resources(trial, {"memory": 1}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=at_once),
            scheduler=stops,
            num_samples=-1,
            reuse_actors=type(stops) is FIFOScheduler,  # its imports are paid once; one that is stopped must end
            trial_name_creator=lambda t: t.config["name"],
            trial_dirname_creator=lambda t: f"{t.config['name'][:120]}-{t.trial_id[-5:]}",
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=folder,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),  # a lost process: the trial goes on from its checkpoints
        ),
    )
    tuner.fit()
