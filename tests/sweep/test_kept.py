"""A sweep's folder: what it keeps, and which settings must not be mixed in it."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from sweeping import begun

from regrow.config import flags
from regrow.config.job import Job
from regrow.config.resume import expand_sweep
from regrow.errors import UserError
from regrow.project import CONF
from regrow.record import manifest, ownership, records
from regrow.runs.trial import STUDY, open_storage
from regrow.sweep import frozen, kinds, ledger, planning, run, search

SEARCH = kinds.Search(
    params=None, fail_fast=False, retry_failed=False, pictures="none", n_trials=3, metric=None,
    direction=None, sampler="tpe", multivariate=True, seed=0, pruner="none",
    pruner_startup_trials=5, pruner_warmup_evaluations=2, max_failures=10,
)  # fmt: skip
RATES: dict[str, BaseDistribution] = {"lr": CategoricalDistribution(["0.1", "0.2"])}

JOB = Job(config={}, folder=None, overrides=(), choices={}, composed={}, command=())


class Composer:
    """Accepts every job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plan(self, number: int, overrides: list[str], swept: list[str], *_: Any) -> Any:
        values = dict(o.partition("=")[::2] for o in swept)
        entry = ledger.JobEntry(number, f"{number}", values, f"{number}", overrides)
        return Planned(entry)


@dataclasses.dataclass(frozen=True)
class Planned:
    entry: ledger.JobEntry
    job: Job = JOB

    @property
    def number(self) -> int:
        return self.entry.number


def trials(folder: Path, space: dict[str, BaseDistribution] = RATES, **changes: Any) -> Any:
    its = dataclasses.replace(SEARCH, **changes)
    if not ledger.read(folder):
        ledger.write(folder, [])
    return search.Trials(
        Composer(folder), its, search.Space([], space), ["val/accuracy"], lambda one: one,  # type: ignore[arg-type]
        search.open_study(folder, ["maximize"]), its.n_trials,
    )  # fmt: skip


def test_a_users_own_folder_named_code_is_not_taken_for_a_copy(tmp_path: Path) -> None:
    thesis = tmp_path / "code" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(UserError, match="holds code, which no sweep"):
        frozen.claim(tmp_path, "digits", [], "auto")
    run.leave_nothing(tmp_path)
    assert thesis.read_text() == "years of work"
    manifest.write_origin(thesis.parent, CONF.parent)  # the negative control
    (tmp_path / ".lock").touch()  # a start creates it first
    ownership.enter(ownership.digest_of_code(thesis.parent, ""))
    frozen.claim(tmp_path, "digits", [], "auto").release()
    run.leave_nothing(tmp_path)
    assert not thesis.exists()


def test_code_that_an_editor_has_open_is_frozen_without_the_editors_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emacs locks a file by a link to nothing, whose name ends in that of the file."""
    root, places, sweep = tmp_path / "root", tmp_path / "places", tmp_path / "sweep"
    for folder in (*(root / part for part in (*frozen.PARTS, "mine")), places, sweep):
        folder.mkdir(parents=True)
    for file in (root / "models.py", root / "mine" / "data.py", places / "my.yaml"):
        file.touch()
        file.with_name(f".#{file.name}").symlink_to("me@machine.123")
    monkeypatch.setattr(frozen, "ROOT", root)
    code, _ = frozen.freeze(sweep, {**flags.DEFAULT, "dir": str(places)})
    found = [path.relative_to(code) for name in ("*.py", "*.yaml") for path in code.rglob(name)]
    assert sorted(map(str, found)) == ["mine/data.py", "models.py", "places/dir/my.yaml"]


def test_code_that_cannot_be_copied_is_one_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise shutil.Error([(name, name, "No space left on device") for name in "ab"])

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        frozen.freeze(tmp_path)
    assert str(caught.value).count("No space left on device") == 1
    assert not [*tmp_path.iterdir()]


def test_a_search_and_a_list_of_jobs_do_not_mix(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"name": "x", "kind": "list of jobs", "config": flags.DEFAULT}
    made = run.Sweep(tmp_path, SEARCH, {}, facts)
    ledger.write(tmp_path, [], **facts)
    made.agree({}, ["lr=1"])
    other = run.Sweep(tmp_path, SEARCH, {}, {**facts, "kind": "search"})
    with pytest.raises(UserError, match="holds a list of jobs, and this is a search"):
        other.agree({}, ["lr=1"])


def test_a_sweep_resumes_with_its_launcher_unless_another_is_named(tmp_path: Path) -> None:
    launcher = ["launcher=slurm", "launcher.partition=gpu"]
    begun(tmp_path, ["seed=0,1"], launcher=launcher)
    assert expand_sweep(tmp_path, ["-m"])[1:4] == ["seed=0,1", *launcher]
    assert expand_sweep(tmp_path, ["launcher.partition=cpu"])[1:4] == [
        "seed=0,1", "launcher=slurm", "launcher.partition=cpu",
    ]  # fmt: skip
    assert expand_sweep(tmp_path, ["launcher=local"])[1:3] == ["seed=0,1", "launcher=local"]


def test_failed_jobs_that_a_command_does_not_name_are_tried_again_on_demand(
    tmp_path: Path,
) -> None:
    entries = [
        ledger.JobEntry(n, f"{n}", {"seed": f"{n}"}, f"{n}", [f"seed={n}"]) for n in range(3)
    ]
    for number, its in enumerate(("failed", "completed", "failed")):
        ledger.note(tmp_path, number, its)
    named: Any = [Planned(entries[2])]
    composer: Any = Composer(tmp_path)
    assert planning.left_over(composer, named, entries, retry=False) == []
    again = planning.left_over(composer, named, entries[:1], retry=True)
    assert [one.number for one in again] == [0]


def test_no_trial_takes_the_folder_and_so_the_result_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Composer.plan

    def in_one(*arguments: Any) -> Planned:
        return Planned(dataclasses.replace(plan(*arguments).entry, folder="one"))

    monkeypatch.setattr(Composer, "plan", in_one)
    its = trials(tmp_path)
    complete(its, its.next())
    assert its.next() is None
    states = [ledger.state_of(tmp_path, entry) for entry in ledger.entries(tmp_path)]
    said = (
        "hydra.sweep.subdir=one: job {} would share it with job 0. Put ${{hydra.job.num}} into it."
    )
    assert states == [("completed", None), *(("failed", said.format(n)) for n in (1, 2))]
    assert [one.state.name for one in its.study.trials] == ["COMPLETE", "FAIL", "FAIL"]


def test_an_interrupted_retry_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = trials(tmp_path)
    one = its.next()
    ledger.note(tmp_path, 0, "failed", "x")
    its.ended(one)
    monkeypatch.setattr(ledger, "note", cut)
    with pytest.raises(InterruptedError):
        trials(tmp_path, retry_failed=True).take_up()
    monkeypatch.undo()
    its = trials(tmp_path, n_trials=1)
    its.take_up()
    assert ledger.state_of(tmp_path, one.entry) == ("retried", "tried again as job 1")
    again = its.next()
    assert again.number == 1 and again.entry.swept == one.entry.swept
    assert its.next() is None


def cut(*arguments: Any) -> None:
    raise InterruptedError


def test_half_a_trial_is_made_whole_as_it_was_proposed(tmp_path: Path) -> None:
    """Optuna writes a trial parameter by parameter, and a kill may happen in between."""
    space: dict[str, BaseDistribution] = {
        "a": FloatDistribution(0, 1),
        "b": FloatDistribution(0, 1),
    }
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=open_storage(tmp_path), study_name=STUDY, direction="maximize"
    )
    study.enqueue_trial({"a": 0.25, "b": 0.75})
    assert study.ask({"a": space["a"]}).params == {"a": 0.25}
    its = trials(tmp_path, space)
    its.take_up()
    assert its.next().entry.swept == {"a": "0.25", "b": "0.75"}


def complete(its: Any, one: Any) -> None:
    """End a trial as a run would that is better for smaller `lr`."""
    run = its.composer.folder / one.entry.folder
    run.mkdir()
    found = {"metric": "val/accuracy", "value": 1 - float(one.entry.swept["lr"])}
    facts = {"seconds": 1, "val": {}, "test": {}, "evaluations_without_improvement": 0}
    summary = {"status": "completed", "steps": 1, "epochs": 1, "best": found, **facts}
    records.write_json(run / records.SUMMARY, summary)
    records.set_status(run, "completed", step=1, pids=[])
    its.ended(one)


def test_an_interrupted_search_makes_the_proposals_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """After the ten trials that TPE draws at random, so that the others depend on the results."""
    space: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-4, 1e-1, log=True)}
    whole, cut_ = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut_):
        folder.mkdir()
    its = trials(whole, space, n_trials=14)
    while (one := its.next()) is not None:
        complete(its, one)
    for _ in range(4):  # four trials, and a fifth that is running when the search is killed
        its = trials(cut_, space, n_trials=14)
        its.take_up()
        for _ in range(4):
            if (one := its.next()) is not None:
                complete(its, one)
        its.next()
    points, others = (
        [(entry.number, entry.swept["lr"]) for entry in ledger.entries(folder)]
        for folder in (whole, cut_)
    )
    assert points == others and len({lr for _, lr in points}) == 14


def test_a_genetic_search_proceeds_by_generations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each generation descends from the better ones of the one before."""
    small = functools.partial(optuna.samplers.NSGAIISampler, population_size=8)
    monkeypatch.setattr(optuna.samplers, "NSGAIISampler", small)
    # With one key, each value would be a mutation.
    space: dict[str, BaseDistribution] = {key: FloatDistribution(0, 1) for key in ("lr", *"abc")}
    its = trials(tmp_path, space, sampler="nsgaii", n_trials=48)
    while (one := its.next()) is not None:
        complete(its, one)
    rates = [float(entry.swept["lr"]) for entry in ledger.entries(tmp_path)]
    assert statistics.fmean(rates[-16:]) < 0.3 < statistics.fmean(rates[:8])


def test_a_search_over_folds_or_seeds_is_warned_of() -> None:
    choice = CategoricalDistribution(["0", "1"])

    def said(*keys: str, **changes: Any) -> str | None:
        space = search.Space([], {**RATES, **dict.fromkeys(keys, choice)})
        return search.warning_of(space, dataclasses.replace(SEARCH, **changes))

    assert said() is None
    assert str(said("data.fold")).startswith("data.fold: the search treats each value as another")
    assert str(said("seed", "+data.fold")).startswith("seed and data.fold: the search")
    assert said("data.fold", sampler="grid") is None  # which tries them all


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"lr": "choice"}, {"lr": "other choice"}, "lr: .* holds a search of another space"),
        ({"lr": "choice"}, {"lr": "choice", "wd": "wide"}, "wd: .* varied in one of the two alone"),
        ({"lr": "wide"}, {"lr": "log"}, "lr: .* holds a search of another space"),
        ({"lr": "wide"}, {"lr": "narrow"}, None),
        ({"+lr": "wide"}, {"++lr": "wide"}, None),
    ],
)
def test_a_search_resumes_in_its_own_space_only(
    before: dict[str, str], now: dict[str, str], said: str | None, tmp_path: Path
) -> None:
    ranges: dict[str, BaseDistribution] = {
        "choice": CategoricalDistribution(["0.1", "0.2"]),
        "other choice": CategoricalDistribution(["0.3", "0.4"]),
        "wide": FloatDistribution(0.1, 1),
        "narrow": FloatDistribution(0.2, 0.5),
        "log": FloatDistribution(0.1, 1, log=True),
    }
    old, new = (
        search.Space([], {key: ranges[name] for key, name in its.items()}) for its in (before, now)
    )
    search.refuse_another(tmp_path, new, SEARCH)  # a new folder
    ledger.write(tmp_path, [], space=old.described())
    if said is None:
        search.refuse_another(tmp_path, new, SEARCH)
        return
    with pytest.raises(UserError, match=said):
        search.refuse_another(tmp_path, new, SEARCH)


def test_a_value_outside_the_space_is_not_used_as_an_override() -> None:
    """Anyone may have edited the journal of a folder that was elsewhere."""
    evil = "1 hydra.callbacks.x._target_=os.system"
    assert search.is_of(RATES["lr"], "0.1") and not search.is_of(RATES["lr"], evil)
    rates = FloatDistribution(0.1, 1.0)
    assert search.is_of(rates, 2.0) and not search.is_of(rates, evil)


def test_an_unreadable_list_of_jobs_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / ledger.FILE).write_text("{half")
    with pytest.raises(UserError, match=r"sweep.json cannot be read"):
        ledger.write(tmp_path, complete=True)
    assert (tmp_path / ledger.FILE).read_text() == "{half"
    assert not ledger.is_open(tmp_path, [])
    assert ledger.read(tmp_path / "none") == {}


def test_lines_that_hold_no_job_are_said() -> None:
    loader: Any = SimpleNamespace()
    with pytest.raises(UserError, match=r"seed=range\(0\): there is no value in it"):
        planning.grid(loader, ["lr=1,2", "seed=range(0)"])
    sets = kinds.Sets(
        params=None, fail_fast=False, retry_failed=False, pictures="none", file=None,
        sets=["notes=don't"],
    )  # fmt: skip
    with pytest.raises(UserError, match="must be overrides"):
        planning.sets_of(sets)


def test_a_search_keeps_the_tpe_that_it_began_with(tmp_path: Path) -> None:
    """Optuna 4 modelled each key separately; Optuna 5 models them jointly, for one metric."""
    tpe = dataclasses.replace(SEARCH, sampler="tpe", multivariate=True)
    search.keep_sampler(tmp_path, tpe)  # a new one
    ledger.write(tmp_path, [], space={}, multivariate=False)
    with pytest.raises(UserError, match=r"sweep.multivariate=true: .* began with false"):
        search.keep_sampler(tmp_path, tpe)
    given = dataclasses.replace(tpe, multivariate=False)
    search.keep_sampler(tmp_path, given)  # the fix
    assert search.sampler_of(given, 3)._multivariate is False
    assert search.sampler_of(tpe, 3)._multivariate is True
