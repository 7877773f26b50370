"""The study of a sweep: an Optuna study with its journal in the store, so that it outlives the process.

optuna-dashboard can open it while the sweep runs:

    optuna-dashboard STORAGE/studies/NAME/journal.log
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from corsa.errors import CorsaError
from corsa.flow.names import part
from corsa.flow.store import Store
from corsa.tuning.journal import mended
from corsa.tuning.space import Domain, grid

optuna.logging.set_verbosity(optuna.logging.ERROR)

Sampler = Literal["tpe", "random", "grid"]
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class SweepStudy:
    """A study in a store: its configuration, its trials, and the next suggestion.

    With an object store, the journal is a local copy that is uploaded whole after every change (`keep`).

    Raises:
        CorsaError: a study of this name exists with another space or experiment, or an earlier journal line is broken.
            An incomplete last line is removed and reported to `say`.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        domains: Mapping[str, Domain],
        default: Mapping[str, float],
        directions: Sequence[Literal["maximize", "minimize"]],
        sampler: Sampler,
        seed: int,
        made_with: Mapping[str, Any],
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        try:
            self._path = f"studies/{part(name)}/journal.log"
        except ValueError as error:
            raise CorsaError(f"--study: {error}") from error
        self._store, self.name = store, name
        self.domains, self._default, self._sampler, self._seed = domains, default, sampler, seed
        if store.files.local:
            self._file = Path(store.files.inside(self._path))
            with store.files.writing():
                self._file.parent.mkdir(parents=True, exist_ok=True)
        else:
            self._file = Path(tempfile.mkdtemp(prefix="corsa-study-")) / "journal.log"
            if (content := store.files.read(self._path)) is not None:
                self._file.write_bytes(content)
        if line := mended(self._file):
            say(line)
        try:
            storage = JournalStorage(JournalFileBackend(str(self._file)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise CorsaError(
                f"the journal {self._file} is not one of Optuna's ({reason}): give another --study"
            ) from error
        known = {study.study_name for study in optuna.get_all_study_summaries(storage)}
        self.study = optuna.create_study(
            storage=storage, study_name=name, directions=list(directions), load_if_exists=True
        )
        if name in known:
            _refuse_another(name, self.study.user_attrs.get("made with", {}), made_with)
        self.study.set_user_attr("made with", dict(made_with))
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not trial.params.keys() >= domains.keys():  # the process ended while it wrote the values
                self.study.tell(trial.number, state=TrialState.FAIL)
        self.keep()

    @property
    def path(self) -> Path | None:
        """The journal, if the store is a local directory."""
        return self._file if self._store.files.local else None

    @property
    def trials(self) -> list[FrozenTrial]:
        """Every trial, oldest first, except those with an incomplete suggestion."""
        found = self.study.get_trials(deepcopy=False)
        return [t for t in found if t.state is not TrialState.WAITING and t.params.keys() >= self.domains.keys()]

    def unfinished(self) -> list[FrozenTrial]:
        """Trials that were running when the sweep stopped. They are resumed."""
        return [t for t in self.trials if t.state is TrialState.RUNNING]

    def setting(self, trial: FrozenTrial | Trial) -> dict[str, float]:
        """The setting of a trial."""
        given = trial.user_attrs.get("setting")  # a setting that no sampler chose is not rounded
        return given or {name: domain.value(trial.params[name]) for name, domain in self.domains.items()}

    def ask(self) -> Trial | None:
        """A new trial; None if a grid has no more.

        The first is the default setting. The second is its control without SAM, if rho may be 0. Later ones depend on
        the seed, the trial number and the results so far, so a resumed study repeats no trial.
        """
        before = self.trials
        number = len(before)
        fixed = self._fixed(before)
        if fixed is None and self._sampler == "grid":
            return None
        waiting = [t for t in self.study.get_trials(deepcopy=False) if t.state is TrialState.WAITING]
        if fixed is not None and not waiting:
            drawn = {name: self.domains[name].drawn(value) for name, value in fixed.items()}
            self.study.enqueue_trial(drawn, user_attrs={"setting": fixed})
        self.study.sampler = self._new_sampler(number)
        trial = self.study.ask({name: _distribution(domain) for name, domain in self.domains.items()})
        self.keep()
        return trial

    def _fixed(self, before: Sequence[FrozenTrial]) -> dict[str, float] | None:
        """The setting of the next trial; None if a sampler chooses it, or a grid has no more."""
        rho = self.domains.get("rho")
        control = [{**self._default, "rho": 0.0}] if rho and rho.zero else []
        points = list(grid(self.domains, self._default)) if self._sampler == "grid" else control
        tried = [self.setting(trial) for trial in before]
        ordered = [dict(self._default), *points]
        return next((point for point in ordered if point not in tried), None)

    def _new_sampler(self, number: int) -> BaseSampler:
        seed = self._seed * 1_000_003 + number
        if self._sampler != "tpe":
            return RandomSampler(seed=seed)
        # Every argument is explicit, because Optuna 5 changed the defaults.
        return TPESampler(
            n_startup_trials=10,
            n_ei_candidates=24,
            multivariate=True,
            group=False,
            constant_liar=True,
            seed=seed,
        )

    def report(self, number: int, epoch: int, score: float) -> None:
        """Record a score at the end of an epoch."""
        trial = Trial(self.study, self.study._storage.get_trial_id_from_study_id_trial_number(self._id, number))
        trial.report(score, epoch)

    def note(self, number: int, **attributes: Any) -> None:
        """Store user attributes of a trial."""
        id_ = self.study._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        for key, value in attributes.items():
            self.study._storage.set_trial_user_attr(id_, key, value)

    def tell(self, number: int, state: TrialState, values: Sequence[float] | None = None, **attributes: Any) -> None:
        """Record the end of a trial."""
        self.note(number, **attributes)
        self.study.tell(number, values if state is TrialState.COMPLETE else None, state=state)
        self.keep()

    @property
    def _id(self) -> int:
        return self.study._study_id

    def keep(self) -> None:
        """Upload the journal if the store is not a local directory."""
        if not self._store.files.local and self._file.exists():
            self._store.files.replace(self._path, self._file.read_bytes())


def _distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    if domain.values:
        values = tuple(int(v) for v in domain.values) if domain.whole else domain.values
        return optuna.distributions.CategoricalDistribution(values)
    if domain.whole:
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return optuna.distributions.FloatDistribution(domain.floor, domain.high, log=domain.log)


def _refuse_another(name: str, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `CorsaError` with every difference if a study was made with another configuration."""
    differences = [
        f"{path}: {_shown(before)} then, {_shown(after)} now"
        for path, before, after in _compared(dict(made), dict(now), "")
    ]
    if differences:
        raise CorsaError(
            f"the study {name!r} in this store was made with something else ({'; '.join(differences)}): "
            "give this sweep a --study name of its own, or ask for what that one was made with"
        )


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _compared(made: Any, now: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(made, dict) and isinstance(now, dict):
        names = dict.fromkeys([*made, *now])
        return [d for n in names for d in _compared(made.get(n), now.get(n), f"{path}.{n}".strip("."))]
    same = list(made) == list(now) if isinstance(made, list | tuple) and isinstance(now, list | tuple) else made == now
    return [] if same else [(path, made, now)]
