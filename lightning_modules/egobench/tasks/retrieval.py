"""Retrieval with a shared list of texts: EPIC-KITCHENS-100 MIR and the classes of Charades-Ego."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from pydantic import Field, TypeAdapter
from torch import Tensor

from datamodules.batch import Request
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Sample
from datamodules.io.validate import Record, validate
from lightning_modules.egobench.fields import Index, Numbers, PlacedRow, Row, to_array
from lightning_modules.egobench.metrics import ClassAveragePrecision, Estimate, MultiInstanceRetrieval
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.tasks.base import Prediction, Result, Task, requested
from lightning_modules.egobench.tasks.vocabulary import PER_CANDIDATE


class RetrievalRow(Record):
    """A row of ``TextRetrieval``."""

    id: str
    labels: dict[str, Any]
    scores: Numbers


class RetrievalText(Record):
    """A row of the texts file."""

    labels: dict[str, Any]
    prior: float | None


class ClipClasses(Record):
    """Labels of a clip of Charades-Ego."""

    classes: list[Index]


class TextClass(Record):
    """Labels of a class of Charades-Ego."""

    class_: Index = Field(alias="class")


class VerbAndNouns(Record):
    """Labels of a clip or caption of EPIC-KITCHENS MIR."""

    verb: Index
    nouns: list[Index]


_ROW, _TEXT = TypeAdapter(RetrievalRow), TypeAdapter(RetrievalText)
_CLIP_CLASSES, _TEXT_CLASS, _VERB_AND_NOUNS = (
    TypeAdapter(ClipClasses),
    TypeAdapter(TextClass),
    TypeAdapter(VerbAndNouns),
)


class TextRetrieval(Task):
    """Rank the benchmark's candidates as descriptions of a clip.

    Row: ``{"id", "labels": {...}, "scores": [C mean token log-likelihoods]}``. Labels are those of the benchmark's
    samples and candidates: Charades-Ego ``{"classes": [3, 77]}`` and ``{"class": 3}``, MIR ``{"verb": 0, "nouns": [2,
    5]}`` for both.

    Scores: those of ``ClassAveragePrecision`` if candidates have a ``class``, else of ``MultiInstanceRetrieval``, in
    the variants with prior, ``_likelihood`` and ``_calibrated``.
    """

    name: ClassVar[str] = "rank_texts"
    shares_candidates: ClassVar[bool] = True
    asks_for_captions: ClassVar[bool] = True

    def requests(self, sample: Sample, encoder: RequestEncoder, cross_check: bool) -> dict[str, Request]:
        """Ask for the likelihood of every candidate."""
        return {"scores": encoder.candidate_loglikelihood(encoder.config.caption)}

    def prior_requests(self, encoder: RequestEncoder) -> dict[str, Request]:
        """Ask for the likelihood of every candidate without a clip."""
        return {"priors": encoder.candidate_loglikelihood(encoder.config.caption, without_video=True)}

    def row(self, sample: Sample, results: Sequence[Result]) -> dict[str, Any]:
        """Return the row described above."""
        return {"id": sample.id, "labels": sample.labels} | requested(results[0])

    def parse(self, row: Row, where: str, candidates: Sequence[PlacedRow]) -> Prediction:
        """Validate a row."""
        parsed = validate(_ROW, row, where)
        scores = to_array(parsed.scores, "scores", where, np.float32, len(candidates), PER_CANDIDATE)
        return Prediction(parsed.id, where, scores={"scores": scores}, labels=parsed.labels)

    def score(self, header: Header, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow]) -> list[Score]:
        """Compute the scores described above."""
        texts = [validate(_TEXT, row, where) for where, row in candidates]
        labels = [text.labels for text in texts]
        prior = _priors([text.prior for text in texts], candidates)
        likelihood = torch.from_numpy(np.stack([each.scores["scores"] for each in predictions]))
        measure = _score_classes if "class" in labels[0] else _score_retrieval

        def add(variant: str, values: Tensor) -> None:
            for name, estimate in measure(values, predictions, candidates, labels).items():
                one_direction = name.endswith("_t2v")
                scores.append(header.score(f"{name}{variant}", estimate, len(predictions), subset=one_direction))

        scores: list[Score] = []
        if prior is None:
            add("_likelihood", likelihood)
            add("_likelihood_calibrated", likelihood.double().log_softmax(dim=1))
        else:
            add("", likelihood - prior)
            add("_likelihood", likelihood)
            add("_calibrated", (likelihood - prior).log_softmax(dim=1))
        return scores


def _priors(priors: Sequence[float | None], candidates: Sequence[PlacedRow]) -> Tensor | None:
    """Return the priors of the candidates, float64 [C]; None if they have none.

    Raises:
        ValueError: only some of them have one.
    """
    missing = [where for (where, _), prior in zip(candidates, priors, strict=True) if prior is None]
    if len(missing) == len(candidates):
        return None
    if missing:
        raise ValueError(
            f"{missing[0]}: field 'prior' is null, in other lines it is not: give all texts a prior, or none"
        )
    return torch.tensor(priors, dtype=torch.float64)


def _score_classes(
    values: Tensor, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow], labels: Sequence[Row]
) -> dict[str, Estimate]:
    classes = []
    for (where, _), label in zip(candidates, labels, strict=True):
        classes.append(validate(_TEXT_CLASS, label, f"{where} labels").class_)
    column = {number: position for position, number in enumerate(classes)}
    if len(column) < len(classes):
        raise ValueError(f"{candidates[0][0]}: field 'labels' gives a class to two texts: remove one")
    target = torch.zeros(len(predictions), len(classes), dtype=torch.bool)
    for row, each in enumerate(predictions):
        present = validate(_CLIP_CLASSES, each.labels, f"{each.where} labels").classes
        unknown = [number for number in present if number not in column]
        if unknown:
            raise ValueError(f"{each.where}: field 'labels' has classes {unknown} that no text has: fix either file")
        target[row, [column[number] for number in present]] = True
    metric = ClassAveragePrecision(len(classes), alone=True)
    metric.update(torch.arange(len(predictions)), values, target)
    estimates = metric.compute()
    absent = round(estimates.pop("classes_without_positives").value)
    if absent:
        rank_zero_warn(f"{absent} of {len(classes)} classes occur in no scored clip and are left out of mAP")
    return estimates


def _score_retrieval(
    values: Tensor, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow], labels: Sequence[Row]
) -> dict[str, Estimate]:
    text_verbs, text_nouns = [], []
    for (where, _), label in zip(candidates, labels, strict=True):
        parsed = validate(_VERB_AND_NOUNS, label, f"{where} labels")
        text_verbs.append(parsed.verb)
        text_nouns.append(parsed.nouns)
    clip_verbs, clip_nouns = [], []
    for each in predictions:
        parsed = validate(_VERB_AND_NOUNS, each.labels, f"{each.where} labels")
        clip_verbs.append(parsed.verb)
        clip_nouns.append(parsed.nouns)
    num_nouns = 1 + max((noun for nouns in (*clip_nouns, *text_nouns) for noun in nouns), default=0)
    metric = MultiInstanceRetrieval(text_verbs, text_nouns, num_nouns, alone=True)
    metric.update(torch.arange(len(predictions)), values, clip_verbs, clip_nouns)
    return metric.compute()
