"""A plan of ablations: its experiments, the conditions they run under, and the runs that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.config import ConfigError, compose, single_visual_inputs

STAGES = ("stage0", "stage1", "stage2", "stage3")


@dataclass(frozen=True)
class Regime:
    """Conditions under which variants are compared.

    Attributes:
        title: for tables.
        overrides: ``key=value`` of both stages.
        stage2_overrides: further ones of stage 2 alone, such as its data.
        stage2, stage3: experiments, next to the plan, that run these stages. One that is in ``stage3`` alone names
            its start in its own files.
    """

    title: str
    overrides: tuple[str, ...] = ()
    stage2_overrides: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()
    stage3: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """A curve over regimes.

    Attributes:
        title: of the axis.
        variants: a curve each; the regimes must run them, and the control.
        points: place on the axis to name of the regime.
    """

    title: str
    variants: tuple[str, ...]
    points: dict[float, str]


@dataclass(frozen=True)
class Plan:
    """The experiments, regimes and comparisons of a plan.

    Attributes:
        prepare: folder, from the plan's, of the experiment whose stages 0 and 1 all variants start from.
        control: the variant that the others are compared with, run by seed.
        regimes: conditions by name.
        once: stages of ``prepare`` that are run with the first seed alone; what follows runs with every seed.
        names: variants for tables and figures.
        headline: scores that figures show.
        sweep: curve over regimes.
        view_probe: experiment whose stage 2 does with egocentric video what stage 1 does with exocentric video.
        overrides: ``key=value`` of every run.
    """

    prepare: str
    control: str
    regimes: dict[str, Regime]
    once: tuple[str, ...] = ("stage0",)
    names: dict[str, str] = field(default_factory=dict)
    headline: tuple[str, ...] = ("choice", "caption", "qa")
    sweep: Sweep | None = None
    view_probe: str | None = None
    overrides: tuple[str, ...] = ()

    def name(self, variant: str) -> str:
        """Return the title of a variant."""
        return self.names.get(variant, variant)


def read_plan(file: Path) -> Plan:
    """Read and check a plan.

    Raises:
        ConfigError: there is no such file, a key is unknown or missing, or a name refers to nothing.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        regimes = {name: Regime(**_tuples(given)) for name, given in content["regimes"].items()}
        sweep = Sweep(**_tuples(content["sweep"])) if content.get("sweep") else None
        plan = Plan(**_tuples(content) | {"regimes": regimes, "sweep": sweep})
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    experiments = {name for regime in plan.regimes.values() for name in (*regime.stage2, *regime.stage3)}
    problems = [
        f"no experiment {name}"
        for name in sorted({*experiments, plan.prepare, *filter(None, [plan.view_probe])})
        if not (file.parent / name / "experiment.yaml").is_file()
    ]
    for name, regime in plan.regimes.items():
        if plan.control not in regime.stage2:
            problems.append(f"regimes.{name}.stage2 lacks the control {plan.control}")
        if regime.stage3 and plan.control not in regime.stage3:
            problems.append(f"regimes.{name}.stage3 lacks the control {plan.control}")
    if sweep:
        for name in sweep.points.values():
            regime_of_point = plan.regimes.get(name)
            if regime_of_point is None:
                problems.append(f"sweep.points: no regime {name}")
            else:
                lacking = [variant for variant in sweep.variants if variant not in regime_of_point.stage2]
                problems += [f"regimes.{name}.stage2 lacks {variant} of the sweep" for variant in lacking]
    if problems:
        raise ConfigError(f"{file}: {'; '.join(problems)}")
    return plan


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


@dataclass(frozen=True)
class Job:
    """One stage of one experiment with one seed.

    Attributes:
        group: name of the regime; ``prepared`` or ``views`` for what belongs to none.
        variant: name of the experiment's folder.
        words: arguments of ``python -m lightning_modules fit``.
        config: the same, resolved.
    """

    group: str
    variant: str
    stage: str
    seed: int
    words: tuple[str, ...]
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.config["run_dir"])

    @property
    def name(self) -> str:
        """Return the run's name for messages."""
        return f"{self.group}/{self.variant}/{self.stage}/seed{self.seed}"

    @property
    def reads(self) -> dict[str, Path]:
        """Return the folders of answers: from all visual inputs (``whole``), and from x or F(x) alone."""
        alone = {reads: Path(config["run_dir"]) for reads, config in single_visual_inputs(self.config).items()}
        return {"whole": self.folder, **alone}


def all_jobs(file: Path, plan: Plan, seeds: Sequence[int], out: Path, overrides: Sequence[str] = ()) -> list[list[Job]]:
    """Return the runs of a plan as lists: each list needs those before it, and its members are independent.

    Args:
        file: the plan's file; the experiments are next to it.
        plan: its content.
        seeds: of the runs. A seed decides the order of samples, dropout, the random start of F and G, and
            which takes are narrated; the validation clips are the same for all.
        out: folder of all runs.
        overrides: ``key=value`` for every run, after the plan's own.
    """

    def job(group: str, variant: str, stage: str, seed: int, more: Sequence[str] = ()) -> Job:
        words = [f"runs={out / group / f'seed{seed}'}", f"seed_everything={seed}"]
        if group != "prepared":
            words += [f"handoffs.{stage}={folder}/handoff" for stage, folder in prepared[seed].items()]
        elif stage == "stage1":
            words += [f"handoffs.stage0={prepared[seed]['stage0']}/handoff"]
        words += [*plan.overrides, *overrides, *more]
        experiment = file.parent / variant
        return Job(
            group, experiment.name, stage, seed, (str(experiment), stage, *words), compose(experiment, stage, words)
        )

    prepared: dict[int, dict[str, Path]] = {seed: {} for seed in seeds}
    waves: dict[str, list[Job]] = {stage: [] for stage in STAGES}
    for stage in ("stage0", "stage1"):
        for seed in seeds[:1] if stage in plan.once else seeds:
            waves[stage].append(job("prepared", plan.prepare, stage, seed))
        for seed in seeds:
            made = next((j for j in waves[stage] if j.seed == seed), waves[stage][0])
            prepared[seed][stage] = made.folder
    for seed in seeds:
        if plan.view_probe:
            waves["stage2"].append(job("views", plan.view_probe, "stage2", seed))
        for group, regime in plan.regimes.items():
            more, of_stage2 = regime.overrides, (*regime.overrides, *regime.stage2_overrides)
            waves["stage2"] += [job(group, v, "stage2", seed, of_stage2) for v in regime.stage2]
            waves["stage3"] += [job(group, v, "stage3", seed, more) for v in regime.stage3]
    return list(waves.values())
