"""Summarise ablation runs: means and intervals over seeds, as JSON, as Markdown tables and as figures."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from experiments.ablations.figures import draw
from experiments.ablations.plan import STAGES, Job, Plan
from lightning_modules.validation.report import markdown_table
from lightning_modules.weights.handoff import read_manifest

COLUMNS = {
    "caption": "caption, exact match",
    "caption_verb": "caption, verb",
    "caption_object": "caption, object",
    "caption_colour": "caption, colour",
    "caption_hand": "caption, hand",
    "choice": "four-way choice",
    "qa": "questions, all",
    "loss": "loss of the true option, nats per token",
}
"""Scores of the generated world that the tables compare, with their titles."""
CLIPS = {
    "all": "all clips",
    "seen": "clips whose action the glasses see",
    "hidden": "clips whose action they do not see",
}
ALONE = {"x": "x alone", "mapped": "F(x) alone"}
MAPPING = {
    "mapping_change": "change of x by F, %",
    "kl": "KL(y, F(x))",
    "kl_without_mapping": "KL(y, x)",
    "kl_mean": "KL(y, mean of y)",
    "kl_answers": "KL of answers",
}
"""Curves at the end of stage 2 that the tables show. The KL of features is that of the variant's own form."""
INTERVAL = (
    "Mean over seeds and its 95 % interval by Student's t; differences are taken within each seed first. Every "
    "interval stands for itself: of twenty without any effect, one excludes zero by chance. All seeds answer the same "
    "held-out clips, the choice of which is in no interval."
)
VIEWS_NOTE = (
    "Same start, steps and narrations. Stage 0, where both start, is mostly exocentric, and the exocentric run sees "
    "every camera of a narration, so part of the difference is practice."
)
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T_975 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
"""97.5 % point of Student's t for 1 to 30 degrees of freedom; scipy would be a dependency for these alone."""


_NAMED = 8
PLACE = ("regime", "variant", "stage", "reads")
_ROW = (*PLACE, "clips")

Scores = dict[str, dict[str, float]]
"""Means by selection of clips and score."""


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and half of its interval; None of a single seed."""

    mean: float
    half: float | None

    @property
    def excludes_zero(self) -> bool:
        """Return True if the interval lies on one side of zero."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Compute the mean and the 95 % interval by Student's t."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, T_975[min(count - 1, len(T_975)) - 1] * deviation / math.sqrt(count))


def read_scores(folder: Path) -> dict[str, Scores]:
    """Compute the means of every score of a run's answers, ``<view>_<score>``, over each of ``CLIPS``.

    Returns:
        Scores from all visual inputs (``whole``); and where the stage reads both, of choices and questions, from each
        of them alone.
    """
    values: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(reads: str, visible: bool, name: str, score: float) -> None:
        for clips in ("all", "seen" if visible else "hidden"):
            values[reads][clips, name].append(score)

    for answer in _lines(folder / "predictions.jsonl"):
        for name, score in answer["scores"].items():
            add("whole", answer["ego_visible"], f"{answer['view']}_{name}", score)
    consistency = folder / "consistency.jsonl"
    for answer in _lines(consistency) if consistency.is_file() else ():
        if not ALONE.keys() <= answer["right"].keys():
            continue
        names = [answer["task"], *(["qa"] if answer["task"].startswith("qa_") else [])]
        for reads, name in product(ALONE, names):
            add(reads, answer["ego_visible"], f"ego_{name}", answer["right"][reads])
    means: dict[str, Scores] = {reads: {clips: {} for clips in CLIPS} for reads in values}
    for reads, of in values.items():
        for (clips, name), scores in of.items():
            means[reads][clips][name] = math.fsum(scores) / len(scores)
    return means


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_results(plan: Plan, jobs: Sequence[Job], folder: Path, missing: Sequence[str] = ()) -> str:
    """Write ``results.json``, ``results.md``, ``runs.jsonl`` and figures of finished runs.

    Args:
        plan: the plan that the runs belong to.
        jobs: the finished runs.
        folder: receives the files.
        missing: names of unfinished runs.

    Returns:
        The Markdown.

    Raises:
        ValueError: no run is finished.
    """
    if not jobs:
        raise ValueError(f"none of {len(missing)} runs is finished: run `make ablations` first")
    folder.mkdir(parents=True, exist_ok=True)
    content = collect(plan, jobs) | {"missing": list(missing)}
    (folder / "results.json").write_text(_by_line(content), encoding="utf-8")
    (folder / "runs.jsonl").write_text("".join(f"{json.dumps(_short(r))}\n" for r in content["runs"]), encoding="utf-8")
    text = markdown(content)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    draw(content, folder)
    return text


def _by_line(content: dict[str, Any]) -> str:
    """Format all but the runs as JSON: a line for each place, with mean and half interval by score."""
    parts = []
    for key, value in content.items():
        if key in ("means", "effects", "views"):
            rows: dict[tuple[str, ...], dict[str, list[float | None]]] = defaultdict(dict)
            for e in value:
                rows[tuple(e[name] for name in _ROW)][e["score"]] = [e["mean"], e["half"]]
            lines = [json.dumps(_short(dict(zip(_ROW, row, strict=True)) | scores)) for row, scores in rows.items()]
            parts.append(f"{json.dumps(key)}: [\n" + ",\n".join(lines) + "\n]")
        elif key != "runs":
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _short(value: Any) -> Any:
    """Round numbers to four decimals, less than one validation clip."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 4))


def collect(plan: Plan, jobs: Iterable[Job]) -> dict[str, Any]:
    """Collect all numbers that tables and figures show.

    ``runs`` are scores by seed, ``means`` these over seeds, and ``effects`` differences from the control in the same
    regime, stage and reading; ``views`` compares stage 1 on exocentric video with the probe on egocentric video.
    """
    runs: list[dict[str, Any]] = [
        {"regime": job.group, "variant": job.variant, "stage": job.stage, "seed": job.seed, "reads": reads}
        | {"trained": _trained(job), "mapping": _mapping(job), "clips": scores}
        for job in jobs
        for reads, scores in read_scores(job.folder).items()
    ]
    by_place: dict[tuple[str, ...], dict[int, Scores]] = defaultdict(dict)
    for run in runs:
        by_place[tuple(run[key] for key in PLACE)][run["seed"]] = run["clips"]
    means, effects = [], []
    for place, seeds in by_place.items():
        regime, variant, stage, reads = place
        means += _estimates(place, seeds)
        if regime in plan.regimes and variant != plan.control:
            effects += _estimates(place, seeds, by_place.get((regime, plan.control, stage, reads), {}))
    views = []
    exo = by_place.get(("prepared", Path(plan.prepare).name, "stage1", "whole"), {})
    ego = by_place.get(("views", plan.view_probe or "", "stage2", "whole"), {})
    if exo:
        seen = {seed: _of_view(exo.get(seed, exo[min(exo)]), "exo") for seed in ego}
        views = _estimates(
            ("views", "exo - ego", "", "whole"), seen, {seed: _of_view(scores, "ego") for seed, scores in ego.items()}
        )
    return {
        "code_versions": Counter(str(read_manifest(job.folder / "handoff")["code_version"]) for job in jobs),
        "interval": INTERVAL,
        "control": plan.control,
        "names": {v: plan.name(v) for v in (*plan.variants, *(run["variant"] for run in runs))},
        "headline": plan.headline,
        "regimes": {name: regime.title for name, regime in plan.regimes.items()},
        "sweep": asdict(plan.sweep) if plan.sweep else None,
        "runs": runs,
        "means": means,
        "effects": effects,
        "views": views,
    }


def _mapping(job: Job) -> dict[str, float]:
    """Return how far F is from the identity after training, and its KL with the bars; empty without guidance."""
    metrics = read_manifest(job.folder / "handoff").get("metrics", {})
    return {name: metrics[f"guidance/{name}"] for name in MAPPING if f"guidance/{name}" in metrics}


def _trained(job: Job) -> int:
    """Count the parameters that changed; a part whose learning rate is 0 does not."""
    parts, rates = read_manifest(job.folder / "handoff")["parts"], job.config["model"]["init_args"]["optim"]
    fixed = {part for part, rate in (rates.get("lr_mult") or {}).items() if rate == 0}
    return sum(math.prod(shape) for name, part in parts.items() if name not in fixed for _, shape in part.values())


def _of_view(scores: Scores, view: str) -> Scores:
    return {
        clips: {name.removeprefix(f"{view}_"): score for name, score in of.items() if name.startswith(f"{view}_")}
        for clips, of in scores.items()
    }


def _estimates(
    place: tuple[str, ...], seeds: dict[int, Scores], control: dict[int, Scores] | None = None
) -> list[dict[str, Any]]:
    """Return an entry for each score and selection of clips; of the differences from ``control`` if it is given.

    Seeds that the control has not finished do not count.
    """
    entries = []
    paired = {seed: of for seed, of in seeds.items() if control is None or seed in control}
    for clips, scores in next(iter(paired.values()), {}).items():
        for score in scores:
            values = [of[clips][score] - (control[seed][clips][score] if control else 0) for seed, of in paired.items()]
            found = {"clips": clips, "score": score, **asdict(estimate(values)), "by_seed": values}
            entries.append(dict(zip(PLACE, place, strict=True)) | found)
    return entries


# ------------------------------------------------------------------------------------------------------------ Markdown


class _Lookup:
    """Look up the cells of tables."""

    def __init__(self, entries: Iterable[dict[str, Any]]) -> None:
        self.entries = {(*(e[key] for key in PLACE), e["clips"], e["score"]): e for e in entries}
        self.seeds = max((len(e["by_seed"]) for e in self.entries.values()), default=0)

    def cell(self, *where: str, signed: bool = False) -> str:
        """Format mean and interval, fractions in per cent; bold where an interval of a difference excludes zero."""
        entry = self.entries.get(where)
        if entry is None:
            return ""
        scale, digits = (1, 3) if where[-1].endswith("loss") else (100, 1)
        text = f"{scale * entry['mean']:{'+' if signed else ''}.{digits}f}"
        if entry["half"] is not None:
            text += f" ± {scale * entry['half']:.{digits}f}"
        if len(entry["by_seed"]) < self.seeds:
            text += f" (of {len(entry['by_seed'])})"
        return f"**{text}**" if signed and Estimate(entry["mean"], entry["half"]).excludes_zero else text


def markdown(content: dict[str, Any]) -> str:
    """Format the content of ``collect`` as tables."""
    means, effects = _Lookup(content["means"]), _Lookup(content["effects"])
    places = list(dict.fromkeys((run["regime"], run["variant"], run["stage"]) for run in content["runs"]))
    versions = ", ".join(f"{version} ({count} runs)" for version, count in content["code_versions"].items())
    lines = [f"Code {versions}. {content['interval']} Scores in per cent, held-out clips.", ""]
    if missing := content.get("missing"):
        shown = ", ".join(missing[:_NAMED]) + ", ..." * (len(missing) > _NAMED)
        lines += [f"{len(missing)} runs are not finished and in no number: {shown}.", ""]
    if content["views"]:
        lines += ["## How much better informed the exocentric cameras are", "", _views(content), "", VIEWS_NOTE, ""]
    for regime, title in content["regimes"].items():
        lines += [f"## {title}", ""]
        for stage in dict.fromkeys(stage for r, _, stage in places if r == regime):
            variants = [v for r, v, s in places if (r, s) == (regime, stage)]
            others = [v for v in variants if v != content["control"]]
            lines += [f"### {stage}", "", _of_stage(content, means, regime, stage, variants), ""]
            if stage == "stage2":
                lines += _mappings(content, regime, variants)
            if others and content["control"] in variants:
                lines += [f"Minus {content['names'][content['control']]}:", ""]
                lines += [_of_stage(content, effects, regime, stage, others, signed=True), ""]
        if (regime, content["control"], "stage3") in places:
            lines += ["### Stage by stage", "", _stages(content, means, regime), ""]
    if content["sweep"]:
        lines += [f"## {content['sweep']['title']}", "", _sweep(content, means, effects), ""]
    return "\n".join(lines).rstrip()


SELECTIONS = {
    ("whole", "all"): "all clips",
    ("whole", "hidden"): CLIPS["hidden"],
    ("x", "all"): f"{ALONE['x']}, all clips",
    ("mapped", "all"): f"{ALONE['mapped']}, all clips",
}


def _of_stage(
    content: dict[str, Any], lookup: _Lookup, regime: str, stage: str, variants: list[str], signed: bool = False
) -> str:
    trained = {(run["regime"], run["variant"], run["stage"]): run["trained"] for run in content["runs"]}
    rows = [["", "answers", "trained", *COLUMNS.values()]]
    for variant in variants:
        name, count = content["names"][variant], f"{trained[regime, variant, stage]:,}"
        for (reads, clips), title in SELECTIONS.items():
            where = (regime, variant, stage, reads, clips)
            cells = [lookup.cell(*where, f"ego_{score}", signed=signed) for score in COLUMNS]
            if any(cells):
                rows.append([name, title, count, *cells])
    return markdown_table(rows, left=2)


def _mappings(content: dict[str, Any], regime: str, variants: list[str]) -> list[str]:
    """Format what F does at the end of training, as lines; none if nothing was measured."""
    rows = [["", *MAPPING.values()]]
    for variant in variants:
        place = (regime, variant, "stage2", "whole")
        found = [run["mapping"] for run in content["runs"] if tuple(run[key] for key in PLACE) == place]
        cells = []
        for name in MAPPING:
            values = [of[name] for of in found if name in of]
            scale, digits = (100, 1) if name == "mapping_change" else (1, 3)
            cells.append(f"{scale * math.fsum(values) / len(values):.{digits}f}" if values else "")
        if any(cells):
            rows.append([content["names"][variant], *cells])
    if len(rows) == 1:
        return []
    note = "F at the end of training, means over seeds. F maps if it changes x, and its KL is below both bars."
    return [note, "", markdown_table(rows), ""]


def _stages(content: dict[str, Any], means: _Lookup, regime: str) -> str:
    """Format egocentric scores of the demonstrator, then of each variant that goes as far as stage 3."""
    demonstrator = next((run["variant"] for run in content["runs"] if run["regime"] == "prepared"), "")
    variants = {run["variant"]: None for run in content["runs"] if (run["regime"], run["stage"]) == (regime, "stage3")}
    rows = [["", "score", *STAGES]]
    for score in content["headline"]:
        for variant in variants:
            places = [("prepared", demonstrator), ("prepared", demonstrator), (regime, variant), (regime, variant)]
            cells = [
                means.cell(*place, stage, "whole", "all", f"ego_{score}")
                for place, stage in zip(places, STAGES, strict=True)
            ]
            rows.append([content["names"][variant], COLUMNS[score], *cells])
    return markdown_table(rows, left=2)


def _views(content: dict[str, Any]) -> str:
    lookup = _Lookup(content["views"])
    rows = [["stage 1 on exocentric minus the same on egocentric video", *CLIPS.values()]]
    for score, title in COLUMNS.items():
        rows.append([title, *(lookup.cell("views", "exo - ego", "", "whole", c, score, signed=True) for c in CLIPS)])
    return markdown_table(rows)


def _sweep(content: dict[str, Any], means: _Lookup, effects: _Lookup) -> str:
    sweep, names, control = content["sweep"], content["names"], content["control"]
    head = [f"{sweep['title']}", "score", names[control], *(f"{names[v]} minus it" for v in sweep["variants"])]
    rows = [
        [f"{float(point):g}", COLUMNS[score], means.cell(regime, control, "stage2", "whole", "all", f"ego_{score}")]
        + [
            effects.cell(regime, variant, "stage2", "whole", "all", f"ego_{score}", signed=True)
            for variant in sweep["variants"]
        ]
        for score in content["headline"]
        for point, regime in sweep["points"].items()
    ]
    return markdown_table([head, *rows], left=2)
