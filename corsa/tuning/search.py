"""Ray Tune runs the trials that the study suggests: concurrency, early stopping, and the result of each trial.

Ray's own OptunaSearch reports one trial at a time, repeats its first points after every restart and abandons running
trials. A resumable sweep needs the study as its only record.
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
    """Passes the study's suggestions to Tune: at most `most` trials in total, `pack` of them in one Tune trial."""

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
                self._score(number, result or {})  # Tune reports the result that stopped a trial only here
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
        score = result.get(f"scores/{number}", math.nan)  # Tune flattens nested results
        if math.isfinite(score):
            self._study.report(number, result["epoch"], score)

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune would save the state for a restore, but a sweep resumes from the study in the store."""
        return {}

    def __deepcopy__(self, memo: Any) -> StudySearch:
        return self

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the study stores its own state."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: the study stores its own state."""

    def _say(self, what: str, number: int, text: str) -> None:
        line = f"{what:<8} trial {number}  {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def scheduler(kind: str, metric: str, rung: int, epochs: int) -> TrialScheduler:
    """The scheduler that stops poor trials. Scores are at least `rung` epochs apart."""
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
    """Run trials until `most` trials of the study have ended. Errors of trials are not raised."""

    def trial(config: Mapping[str, Any]) -> None:
        chosen = [(int(number), dict(setting)) for number, setting in config["trials"]]
        try:
            results = trials.perform(chosen, config["name"])
        except Exception as error:  # such as a lost storage: recorded for these trials; the sweep continues
            cause = f"{type(error).__name__}: {error}"
            results = {number: {"failed": cause, "seconds": None} for number, _ in chosen}
        metric = trials.config.objectives[0]
        values = [r["metrics"][metric]["value"] for r in results.values() if "failed" not in r]
        best = (max if METRICS[metric].better == "high" else min)(values, default=math.nan)
        epochs = trials.experiment.training.epochs * trials.config.rounds.rounds * len(trials.experiment.seeds)
        tune.report({metric: best, "epoch": epochs, "results": json.dumps(results)})

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Ray prints its box of settings whatever the value of `verbose`
    searcher = StudySearch(study, trials, most, pack, console)
    tuner = tune.Tuner(
        # The workers request their own resources and the trial itself needs no CPU, but Tune must place something.
        tune.with_resources(trial, {"memory": 1}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=at_once),
            scheduler=stops,
            num_samples=-1,
            reuse_actors=type(stops) is FIFOScheduler,  # imports run once; a stopped trial must end its process
            trial_name_creator=lambda t: t.config["name"],
            trial_dirname_creator=lambda t: f"{t.config['name'][:120]}-{t.trial_id[-5:]}",
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=folder,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),  # lost process: resume from checkpoints
        ),
    )
    tuner.fit()
