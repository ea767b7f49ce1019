"""A plan of ablations: its experiments, the conditions they run under, and the runs that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.config import ConfigError, compose

STAGES = ("stage0", "stage1", "stage2", "stage3")


@dataclass(frozen=True)
class Regime:
    """Conditions under which variants are compared.

    Attributes:
        title: for tables.
        overrides: ``key=value`` of both stages.
        stage2_overrides: further ones of stage 2 alone, such as its data.
        stage2, stage3: variants that run these stages. One that is in ``stage3`` alone names its start in its
            overrides.
        seeds: number of seeds, if fewer than the plan has.
    """

    title: str
    seeds: int | None = None
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
class Variant:
    """A set of overrides under comparison.

    Attributes:
        title: for tables and figures.
        extends: variant whose overrides come first.
        overrides: ``key=value`` of stages 2 and 3.
        stage2, stage3: further ones of one stage.
        seeds: number of seeds, if fewer than the plan has.
    """

    title: str
    seeds: int | None = None
    extends: str | None = None
    overrides: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()
    stage3: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The content of a sweep file.

    Attributes:
        prepare: folder, relative to the file, of the experiment that the variants change. Its stages 0 and 1 run first.
        control: the variant that the others are compared with, run by run.
        variants: overrides by name.
        regimes: conditions by name.
        seeds: number of seeds.
        once: stages of ``prepare`` that are run with the first seed alone; later stages run with every seed.
        headline: scores that figures show.
        sweep: curve over regimes.
        view_probe: variant whose stage 2 does with egocentric video what stage 1 does with exocentric video.
        overrides: ``key=value`` of every run.
    """

    prepare: str
    control: str
    variants: dict[str, Variant]
    regimes: dict[str, Regime]
    seeds: int = 3
    once: tuple[str, ...] = ("stage0",)
    headline: tuple[str, ...] = ("choice", "caption", "qa")
    sweep: Sweep | None = None
    view_probe: str | None = None
    overrides: tuple[str, ...] = ()

    def name(self, variant: str) -> str:
        """Return the title of a variant, or the name of an experiment."""
        return self.variants[variant].title if variant in self.variants else variant

    def seeds_of(self, regime: str, variant: str, seeds: Sequence[int]) -> Sequence[int]:
        """Return those of some seeds that a variant runs with under a regime: the first ones."""
        limits = [self.regimes[regime].seeds, self.variants[variant].seeds]
        return seeds[: min((limit for limit in limits if limit is not None), default=len(seeds))]

    def overrides_of(self, variant: str, stage: str) -> list[str]:
        """Return the overrides of a variant in a stage; those of the variants that it extends come first."""
        given = self.variants[variant]
        inherited = self.overrides_of(given.extends, stage) if given.extends else []
        return [*inherited, *given.overrides, *(given.stage2 if stage == "stage2" else given.stage3)]


def read_plan(file: Path, quick: bool = False) -> Plan:
    """Read and check a sweep file.

    Args:
        file: the YAML file.
        quick: replace keys by those below ``quick``.

    Raises:
        ConfigError: there is no such file, a key is unknown or missing, or a name refers to nothing.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        short = content.pop("quick", {})
        content |= short if quick else {}
        variants = {name: Variant(**_tuples(given)) for name, given in content["variants"].items()}
        regimes = {name: Regime(**_tuples(given)) for name, given in content["regimes"].items()}
        sweep = Sweep(**_tuples(content["sweep"])) if content.get("sweep") else None
        plan = Plan(**_tuples(content) | {"variants": variants, "regimes": regimes, "sweep": sweep})
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    if problems := _problems(plan, file):
        raise ConfigError(f"{file}: {'; '.join(problems)}")
    return plan


def _problems(plan: Plan, file: Path) -> list[str]:
    """Return a line for each name in a plan that refers to nothing."""
    problems = []
    if not (file.parent / plan.prepare / "experiment.yaml").is_file():
        problems.append(f"no experiment {plan.prepare}")
    used = {plan.control, *filter(None, [plan.view_probe, *(v.extends for v in plan.variants.values())])}
    for regime in plan.regimes.values():
        used |= {*regime.stage2, *regime.stage3}
    problems += [f"no variant {name}" for name in sorted(used - plan.variants.keys())]
    if plan.control in plan.variants and plan.variants[plan.control].seeds is not None:
        problems.append(f"variants.{plan.control}.seeds: the control runs with all seeds, remove the key")
    known = list(plan.variants)
    for name, variant in plan.variants.items():
        if variant.extends in known and known.index(variant.extends) >= known.index(name):
            problems.append(f"variants.{name}.extends: {variant.extends} must come before it")
    for name, regime in plan.regimes.items():
        if plan.control not in regime.stage2:
            problems.append(f"regimes.{name}.stage2 lacks the control {plan.control}")
        if regime.stage3 and plan.control not in regime.stage3:
            problems.append(f"regimes.{name}.stage3 lacks the control {plan.control}")
    for name in plan.sweep.points.values() if plan.sweep else ():
        if name not in plan.regimes:
            problems.append(f"sweep.points: no regime {name}")
            continue
        for variant_name in plan.sweep.variants if plan.sweep else ():
            if variant_name not in plan.regimes[name].stage2:
                problems.append(f"regimes.{name}.stage2 lacks {variant_name} of the sweep")
    return problems


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


@dataclass(frozen=True)
class Job:
    """One stage of one experiment with one seed.

    Attributes:
        group: name of the regime; ``prepared`` or ``views`` for what belongs to none.
        variant: name of the variant, or of the experiment that is prepared.
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


def all_jobs(file: Path, plan: Plan, seeds: Sequence[int], out: Path, overrides: Sequence[str] = ()) -> list[list[Job]]:
    """Return the runs of a plan as lists: each list needs those before it, and its members are independent.

    Args:
        file: the sweep file, which experiments are relative to.
        plan: its content.
        seeds: of the runs. A seed decides the order of samples, dropout, the random start of F and G, and
            which takes are narrated; the validation clips are the same for all.
        out: folder of all runs.
        overrides: ``key=value`` for every run, after the plan's own.
    """
    experiment = file.parent / plan.prepare

    def job(group: str, variant: str | None, stage: str, seed: int, more: Sequence[str] = ()) -> Job:
        words = [f"runs={out / group / f'seed{seed}'}", f"seed_everything={seed}"]
        if variant is not None:
            words.append(f"experiment=ablations/{variant}")
            words += [f"handoffs.{earlier}={folder}/handoff" for earlier, folder in prepared[seed].items()]
            words += plan.overrides_of(variant, stage)
        elif stage == "stage1":
            words.append(f"handoffs.stage0={prepared[seed]['stage0']}/handoff")
        words += [*plan.overrides, *overrides, *more]
        arguments = (str(experiment), stage, *words)
        return Job(group, variant or experiment.name, stage, seed, arguments, compose(experiment, stage, words))

    prepared: dict[int, dict[str, Path]] = {seed: {} for seed in seeds}
    waves: dict[str, list[Job]] = {stage: [] for stage in STAGES}
    for stage in ("stage0", "stage1"):
        for seed in seeds[:1] if stage in plan.once else seeds:
            waves[stage].append(job("prepared", None, stage, seed))
        for seed in seeds:
            made = next((j for j in waves[stage] if j.seed == seed), waves[stage][0])
            prepared[seed][stage] = made.folder
    for seed in seeds:
        if plan.view_probe and seed in seeds[: plan.variants[plan.view_probe].seeds]:
            waves["stage2"].append(job("views", plan.view_probe, "stage2", seed))
        for group, regime in plan.regimes.items():
            more, of_stage2 = regime.overrides, (*regime.overrides, *regime.stage2_overrides)
            for variants, stage, words in ((regime.stage2, "stage2", of_stage2), (regime.stage3, "stage3", more)):
                run = [v for v in variants if seed in plan.seeds_of(group, v, seeds)]
                waves[stage] += [job(group, v, stage, seed, words) for v in run]
    return list(waves.values())
