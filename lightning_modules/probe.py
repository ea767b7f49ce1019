"""Look into a finished stage 2: what y, x and F(x) tell about a clip, bars of the KL, gradients: ``make probe``."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import ClipBatch, QuestionBatch
from datamodules.clips.dataset import ClipTextDataset
from datamodules.clips.sampler import BatchRequest
from datamodules.clips.validation import ValidationClip
from datamodules.video.errors import ClipDecodeError
from lightning_modules.config import ConfigError
from lightning_modules.evaluation import trained_run
from lightning_modules.losses import KLBars, guidance_kl_loss
from lightning_modules.run import Run
from lightning_modules.stages.guidance import DemonstratorLearnerGuidance, GuidanceFeatures
from lightning_modules.validation.report import markdown_table
from lightning_modules.validation.scores import normalise

FEATURES = {"y": "y", "x": "x", "mapped": "F(x)"}
_BATCH = 16
_STATISTICS_BATCHES = 4
_BARS = {
    "guidance/kl": "F(x)",
    "guidance/kl_without_mapping": "x",
    "guidance/kl_mean": "mean of y at each position",
    "guidance/kl_uniform": "uniform",
    "other_camera": "y of another camera at the same moment",
}


@dataclass
class Encoded:
    """Features of some clips, averaged over the patches of each frame, and what is known about the clips.

    Attributes:
        features: float32 [clips, T * C] each, by the names of ``FEATURES``.
        labels: for each clip the value of each factor that is known, such as ``verb`` to ``lift``.
        measured: means over the clips of the distances that the stage logs, by name.
    """

    features: dict[str, Tensor]
    labels: list[dict[str, str]]
    measured: dict[str, float]


def probe(config: dict[str, Any], samples: int) -> dict[str, Any]:
    """Encode training and validation clips with a finished stage 2, and print tables about their features.

    Linear probes are fitted to training clips and tested on validation clips. The factors are those that validation
    questions ask about: parts of captions, and kinds of questions. A training clip has a value of a factor if its
    narration contains the words of that value and of no other. The numbers are also written to ``probe.json``.

    Args:
        config: resolved configuration of the stage.
        samples: training clips, evenly spread, and at most as many validation clips.

    Returns:
        The numbers: ``accuracy`` by factor, distances in ``kl`` by clips, norms in ``gradients`` by loss.

    Raises:
        ConfigError: the stage is no guidance, or has no validation clips.
        WeightsError: the stage has no weights.
    """
    if samples < _BATCH:
        raise ConfigError(f"--samples: got {samples}, allowed: {_BATCH} or more")
    prober = _Prober(config)
    values = _values(prober.validation_clips)
    train = prober.train_clips(samples, values)
    validation = prober.held_out_clips(samples)
    found = {
        "accuracy": {name: _accuracies(name, train, validation) for name in values},
        "kl": {"training": train.measured, "validation": validation.measured},
        "gradients": prober.gradients(),
    }
    found["accuracy"] = {name: row for name, row in found["accuracy"].items() if row}
    (prober.run.folder / "probe.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(_report(found, len(train.labels), len(validation.labels)))
    return found


class _Prober:
    """The trained stage and its clips."""

    def __init__(self, config: dict[str, Any]) -> None:
        config = copy.deepcopy(config)
        if "demonstrations" in config["model"]["init_args"]:
            config["model"]["init_args"]["demonstrations"] = None  # y is needed here
        self.run: Run = trained_run(config)[0]
        stage = self.run.stage
        if not isinstance(stage, DemonstratorLearnerGuidance):
            raise ConfigError(
                f"stage: got {self.run.name}, but only guidance has y, x and F(x): name that stage, stage2"
            )
        self.stage, self.device = stage, self.run.trainer.strategy.root_device
        self.validation = self.run.datamodule.held_out_set()
        self.validation_clips = self.validation.items
        self.run.datamodule.setup("fit")
        assert self.run.datamodule.train_set is not None
        self.dataset: ClipTextDataset = self.run.datamodule.train_set
        stage.configure_model()
        stage.to(self.device)
        stage.kl = replace(stage.kl, warmup_fraction=0.0)
        stage.kl_bars, stage.measures = KLBars(longest=2**62), True

    def train_clips(self, samples: int, values: Mapping[str, set[str]]) -> Encoded:
        """Encode training clips, after the statistics of y from the first of them."""
        epoch = self.dataset.epoch_samples(0)
        indices = epoch[np.linspace(0, len(epoch) - 1, min(samples, len(epoch))).astype(np.int64)].tolist()
        self.stage.train()
        spread = indices[:: max(1, len(indices) // (_BATCH * _STATISTICS_BATCHES))]
        for batch in self._read(spread[: _BATCH * _STATISTICS_BATCHES]):
            features = self._encode(batch)
            self.stage.standardizer.observe(self.stage.compared_features(features)[0], batch.valid)
        self.stage.standardizer.update()
        self.stage.eval()
        parts = []
        for place, batch in enumerate(self._read(indices)):
            features = self._encode(batch)
            part = self._measure(features, batch)
            of_batch = indices[place * _BATCH : (place + 1) * _BATCH]
            part.labels = [_labels(self.dataset.words(index, 0), values) for index in of_batch]
            if place < _STATISTICS_BATCHES:
                part.measured |= self._other_camera(features, batch, of_batch)
            parts.append(_valid_rows(part, batch.valid))
        return _join(parts)

    def held_out_clips(self, samples: int) -> Encoded:
        """Encode validation clips; the mean of y stays that of the training clips."""
        bars, parts = self.stage.kl_bars, []
        chosen = np.linspace(0, len(self.validation) - 1, min(samples, len(self.validation))).astype(int).tolist()
        for start in range(0, len(chosen), _BATCH):
            rows = [self.validation[index] for index in chosen[start : start + _BATCH]]
            questions: QuestionBatch = self.validation.collate(rows).to(self.device)
            batch = ClipBatch(questions.ids, questions.prompts, 1.0, questions.ego_video, questions.exo_video)
            self.stage.kl_bars = copy.copy(bars)
            part = self._measure(self._encode(batch), batch)
            part.labels = [_known(clip) for clip, _ in rows]
            parts.append(part)
        self.stage.kl_bars = bars
        return _join(parts)

    def gradients(self) -> dict[str, dict[str, float]]:
        """Return the norm of the gradient of each weighted loss on each part that trains, for one batch."""
        stage = self.stage.train()
        size = min(self.run.datamodule.micro_batch_size or _BATCH, _BATCH)
        samples = self.dataset.epoch_samples(0)
        narrated = (index for index in samples.tolist() if self.dataset.words(index, 0))
        (batch,) = self._read(list(islice(narrated, size)) or samples[:size].tolist())
        norms: dict[str, dict[str, float]] = {}
        with self.run.trainer.precision_plugin.forward_context():
            losses = stage.model.run(stage.losses, batch)
        for name, loss in losses.items():
            norms[name] = {}
            for part in stage.trained:
                weights = [weight for weight in stage.model.part(part).values() if weight.requires_grad]
                found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                squares = [gradient.float().square().sum() for gradient in found if gradient is not None]
                norms[name][part] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        return norms

    def _read(self, indices: list[int]) -> Iterator[ClipBatch]:
        for start in range(0, len(indices), _BATCH):
            chosen = indices[start : start + _BATCH]
            yield self.dataset.__getitems__(BatchRequest(0, chosen, chosen, 1)).to(self.device)

    @torch.no_grad()
    def _encode(self, batch: ClipBatch) -> GuidanceFeatures:
        def work() -> GuidanceFeatures:
            model = self.stage.model
            ego = model.ego_encoder(self.stage.video_of(batch, "ego"))
            exo = model.exo_encoder(self.stage.video_of(batch, "exo"))
            mapped = model.ego_to_exo(ego)
            as_ego = model.exo_to_ego(exo)
            self.change_back = float((as_ego - exo).norm() / exo.norm())
            visual = model.learner_view(ego, mapped) if self.stage.kl.where == "tokens" else ego.new_zeros(())
            return GuidanceFeatures(ego, exo, mapped, visual)

        with self.run.trainer.precision_plugin.forward_context():
            features: GuidanceFeatures = self.stage.model.run(work)
        return features

    @torch.no_grad()
    def _measure(self, features: GuidanceFeatures, batch: ClipBatch) -> Encoded:
        self.stage.step_log = {}
        self.stage.compare_features(features, batch)
        measured = {name: float(value) for name, value in self.stage.step_log.items()}
        measured["guidance/mapping_change_back"] = self.change_back
        pooled = {"y": features.exo, "x": features.ego, "mapped": features.mapped}
        return Encoded({name: f.float().mean((2, 3)).flatten(1).cpu() for name, f in pooled.items()}, [], measured)

    @torch.no_grad()
    def _other_camera(self, features: GuidanceFeatures, batch: ClipBatch, indices: list[int]) -> dict[str, float]:
        """Return the KL of y to y of another camera at the same moment, if some of the clips have one."""
        rows, videos = [], []
        for row, index in enumerate(indices):
            near = [i for i in (index - 1, index + 1) if 0 <= i < len(self.dataset)]
            same = [i for i in near if self.dataset.name(i) == self.dataset.name(index)]
            if not same or not batch.valid[row]:
                continue
            try:
                videos.append(self.dataset.videos(self.dataset.span(same[0], 0))["exo"])
                rows.append(row)
            except ClipDecodeError:
                continue
        if not rows:
            return {}
        place = torch.tensor(rows, device=self.device)
        stage, kl = self.stage, self.stage.kl
        with self.run.trainer.precision_plugin.forward_context():
            other = stage.model.run(stage.model.exo_encoder, torch.stack(videos).to(self.device))
            visual = features.visual[place] if features.visual.dim() else features.visual
            ego, mapped = features.ego[place], features.mapped[place]
            pair = [GuidanceFeatures(ego, exo, mapped, visual) for exo in (features.exo[place], other)]
            y, of_other = (stage.standardizer(stage.compared_features(one)[0]) for one in pair)
        valid = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        return {"other_camera": float(guidance_kl_loss(y, of_other, valid, kl.tau, kl.axis, kl.pool))}


def _known(clip: ValidationClip) -> dict[str, str]:
    """Return what the questions about a validation clip say about it: parts of captions, and kinds of questions."""
    known: dict[str, str] = {}
    for question in clip.questions:
        if question.options:
            continue
        known |= {name: normalise(words) for name, words in question.parts.items()}
        if question.task.startswith("qa_"):
            known.setdefault(question.task.removeprefix("qa_"), normalise(question.answer))
    return known


def _values(clips: list[ValidationClip]) -> dict[str, set[str]]:
    """Return the values of every factor, in the order in which the questions name the factors."""
    values: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        for name, value in _known(clip).items():
            values[name].add(value)
    return dict(values)


def _labels(words: list[str], values: Mapping[str, set[str]]) -> dict[str, str]:
    """Return the factors whose value a narration names, each once."""
    text = f" {normalise(words[-1])} " if words else ""
    found = {name: [value for value in of_factor if f" {value} " in text] for name, of_factor in values.items()}
    return {name: named[0] for name, named in found.items() if len(named) == 1}


def _valid_rows(part: Encoded, valid: Tensor) -> Encoded:
    keep = valid.cpu()
    labels = [label for label, kept in zip(part.labels, keep.tolist(), strict=True) if kept]
    return Encoded({name: feature[keep] for name, feature in part.features.items()}, labels, part.measured)


def _join(parts: list[Encoded]) -> Encoded:
    """Join batches; each distance is averaged over the batches that have it."""
    measured: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name, value in part.measured.items():
            measured[name].append(value)
    return Encoded(
        {name: torch.cat([part.features[name] for part in parts]) for name in FEATURES},
        [label for part in parts for label in part.labels],
        {name: sum(values) / len(values) for name, values in measured.items()},
    )


def _accuracies(factor: str, train: Encoded, validation: Encoded) -> dict[str, float]:
    """Return the accuracy of a linear probe on each feature and that of the most frequent value, with both numbers.

    Nothing is returned for a factor of which training narrations name fewer than two values.
    """
    rows, tested = ([i for i, label in enumerate(part.labels) if factor in label] for part in (train, validation))
    names = sorted({train.labels[row][factor] for row in rows})
    if len(names) < 2 or not tested:
        return {}
    classes = torch.tensor([names.index(train.labels[row][factor]) for row in rows])
    truth = [validation.labels[row][factor] for row in tested]
    frequent = names[int(classes.bincount().argmax())]
    found = {"training clips": float(len(rows)), "validation clips": float(len(tested))}
    found["most frequent"] = sum(value == frequent for value in truth) / len(truth)
    for name in FEATURES:
        scores = ridge(train.features[name][rows], classes, validation.features[name][tested])
        given = [names[place] for place in scores.argmax(1).tolist()]
        found[name] = sum(one == other for one, other in zip(given, truth, strict=True)) / len(truth)
    return found


def ridge(features: Tensor, classes: Tensor, tested: Tensor) -> Tensor:
    """Fit a ridge regression to one-hot classes in closed form; its strength has the least leave-one-out error.

    Args:
        features: float [N, D].
        classes: int64 [N], from 0.
        tested: float [M, D].

    Returns:
        float64 [M, classes], scores of each class.
    """
    x, new = features.double(), tested.double()
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, new = (x - mean) / deviation, (new - mean) / deviation
    target = torch.nn.functional.one_hot(classes).double()
    prior = target.mean(0)
    # In the space of clips, which are fewer than channels at full size.
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T)
    best_error, best = float("inf"), torch.empty(0)
    for power in range(-3, 4):
        shrunk = 1 / (eigenvalues.clamp(min=0) + eigenvalues.mean() * 10.0**power)
        weights = vectors @ (shrunk[:, None] * (vectors.T @ (target - prior)))
        left_out = weights / (vectors.square() @ shrunk)[:, None]
        error = float(left_out.square().sum())
        if error < best_error:
            best_error, best = error, weights
    return new @ x.T @ best + prior


def _report(found: dict[str, Any], trained: int, tested: int) -> str:
    """Return the tables as Markdown."""
    factors = [["linear probe, %", "most frequent", *FEATURES.values(), "clips"]]
    for name, row in found["accuracy"].items():
        scores = [f"{100 * row[column]:.1f}" for column in ("most frequent", *FEATURES)]
        factors.append([name, *scores, f"{row['training clips']:.0f} / {row['validation clips']:.0f}"])
    kl = found["kl"]
    bars = [["KL of y to", *kl]]
    for name, title in _BARS.items():
        if any(name in measured for measured in kl.values()):
            bars.append([title, *(f"{m[name]:.4f}" if name in m else "" for m in kl.values())])
    for name, title in (("mapping_change", "change by F, %"), ("mapping_change_back", "change by G, %")):
        bars.append([title, *(f"{100 * m[f'guidance/{name}']:.1f}" for m in kl.values())])
    gradients = found["gradients"]
    parts = [["norm of the gradient", *gradients]]
    for part in next(iter(gradients.values())):
        parts.append([part, *(f"{norms[part]:.2e}" for norms in gradients.values())])
    title = f"{trained} training clips, {tested} validation clips"
    return "\n\n".join([title, *(markdown_table(rows) for rows in (factors, bars, parts))])
