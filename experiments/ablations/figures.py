"""Draw the results of ablation runs, from the numbers in ``results.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    import matplotlib as found
    from matplotlib.figure import Figure

    matplotlib: Any = found
except ImportError:  # of the extra `dev`
    matplotlib = None


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Draw ``effects.svg``, ``stages.svg`` and, with a sweep, ``sweep.svg``, if matplotlib is installed.

    Args:
        content: see ``collect``.
        folder: where the files go.
    """
    if matplotlib is None:
        print("no figures: matplotlib is missing, pip install '.[dev]'")
        return []
    figures = {"effects": _effects(content), "stages": _stages(content)}
    if content["sweep"]:
        figures["sweep"] = _sweep(content)
    files = []
    with matplotlib.rc_context({"svg.hashsalt": "exo2ego", "svg.fonttype": "none", "font.size": 9}):
        for name, figure in figures.items():
            files.append(folder / f"{name}.svg")
            figure.savefig(files[-1], bbox_inches="tight", metadata={"Date": None})
    return files


def _effects(content: dict[str, Any]) -> Figure:
    """Draw differences from the control after stage 2: a row of panels for each regime, a panel for each score."""
    regimes, scores, names = content["regimes"], content["headline"], content["names"]
    chosen = {
        regime: [e for e in content["effects"] if _is(e, regime=regime, stage="stage2", reads="whole", clips="all")]
        for regime in regimes
    }
    variants = {regime: list(dict.fromkeys(e["variant"] for e in entries)) for regime, entries in chosen.items()}
    heights = [max(1, len(variants[regime])) for regime in regimes]
    figure = Figure(figsize=(3.2 * len(scores), 0.8 * len(regimes) + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(regimes), len(scores), squeeze=False, sharex="col", height_ratios=heights)
    for row, regime in zip(panels, regimes, strict=True):
        for panel, score in zip(row, scores, strict=True):
            entries = {e["variant"]: e for e in chosen[regime] if e["score"] == f"ego_{score}"}
            for place, variant in enumerate(variants[regime]):
                entry = entries[variant]
                panel.errorbar(100 * entry["mean"], place, xerr=_half(entry), fmt="o", color="C0", capsize=3)
                panel.plot([100 * d for d in entry["by_seed"]], [place] * len(entry["by_seed"]), "|", color="0.5")
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_ylim(max(1, len(variants[regime])) - 0.5, -0.5)
            panel.set_yticks(range(len(variants[regime])), [])
        row[0].set_yticklabels([names[variant] for variant in variants[regime]])
        row[0].set_title(regimes[regime], loc="left")
    for panel, score in zip(panels[-1], scores, strict=True):
        panel.set_xlabel(f"{score}, points above {names[content['control']]}")
    return figure


def _stages(content: dict[str, Any]) -> Figure:
    """Draw egocentric scores stage by stage: a row of panels for each regime that has stage 3 (or all)."""
    means = [e for e in content["means"] if _is(e, reads="whole", clips="all")]
    regimes = [r for r in content["regimes"] if any(_is(e, regime=r, stage="stage3") for e in means)]
    regimes = regimes or list(content["regimes"])
    scores = content["headline"]
    figure = Figure(figsize=(3.2 * len(scores), 2.6 * len(regimes)), layout="constrained")
    panels = figure.subplots(len(regimes), len(scores), squeeze=False, sharex=True, sharey="col")
    for row, regime in zip(panels, regimes, strict=True):
        for panel, score in zip(row, scores, strict=True):
            before = [e for e in means if _is(e, regime="prepared", score=f"ego_{score}")]
            after = [e for e in means if _is(e, regime=regime, score=f"ego_{score}")]
            last = [e for e in after if e["stage"] == "stage3"] or after
            for variant in dict.fromkeys(e["variant"] for e in last):
                entries = sorted([*before, *(e for e in after if e["variant"] == variant)], key=lambda e: e["stage"])
                places, values = [e["stage"] for e in entries], [100 * e["mean"] for e in entries]
                halves = [100 * (e["half"] or 0) for e in entries]
                label = content["names"][variant]
                panel.errorbar(places, values, yerr=halves, marker="o", capsize=3, label=label)
            panel.set_ylabel(f"{score}, per cent")
        row[0].set_title(content["regimes"][regime], loc="left")
        if row[-1].has_data():
            row[-1].legend(fontsize=7)
    return figure


def _sweep(content: dict[str, Any]) -> Figure:
    """Draw differences from the control along the sweep, and the control itself below."""
    sweep, scores, names = content["sweep"], content["headline"], content["names"]
    figure = Figure(figsize=(3.2 * len(scores), 4.6), layout="constrained")
    panels = figure.subplots(2, len(scores), squeeze=False, sharex=True)
    places = list(range(len(sweep["points"])))
    for column, score in enumerate(scores):
        where = {"stage": "stage2", "reads": "whole", "clips": "all", "score": f"ego_{score}"}
        for kind, variants, panel in (
            ("effects", sweep["variants"], panels[0, column]),
            ("means", (content["control"], *sweep["variants"]), panels[1, column]),
        ):
            for variant in variants:
                line = [
                    (place, e)
                    for place, regime in zip(places, sweep["points"].values(), strict=True)
                    for e in content[kind]
                    if _is(e, regime=regime, variant=variant, **where)
                ]
                means, halves = [100 * e["mean"] for _, e in line], [_half(e) for _, e in line]
                color = "0.4" if variant == content["control"] else f"C{sweep['variants'].index(variant)}"
                label, reached = names[variant], [place for place, _ in line]
                panel.errorbar(reached, means, yerr=halves, marker="o", capsize=3, color=color, label=label)
        panels[0, column].axhline(0, color="black", linewidth=0.8)
        panels[0, column].set_ylabel(f"{score}, points above {names[content['control']]}")
        panels[1, column].set_ylabel(f"{score}, per cent")
        panels[1, column].set_xticks(places, [f"{float(point):g}" for point in sweep["points"]])
        panels[1, column].set_xlabel(sweep["title"])
    panels[1, 0].legend(fontsize=7)
    return figure


def _half(entry: dict[str, Any]) -> float:
    return 100 * (entry["half"] or 0.0)


def _is(entry: dict[str, Any], **wanted: str) -> bool:
    return all(entry[key] == value for key, value in wanted.items())
