"""From what the model answered to scores: the format of prediction files, and what is computed from them.

Every number can be computed again from three files of a benchmark.

``<benchmark>.header.json``, an object:
    ``benchmark``, ``task``; ``total``: samples in the official file; ``missing``: ``{id: why it was not asked}``;
    ``settings``: an object of what the answers depend on; ``invented``: whether the samples are of a generated world.

``<benchmark>.jsonl``, a row for each sample that was asked, in any order:
    choice
        ``{"id", "groups": [...], "answer": 2 | null, "letters": [[K log-probabilities] for each rotation]}`` and maybe
        ``"likelihood": [K mean token log-likelihoods of the options' texts]``, ``"said": "what was generated"`` and,
        to read the words of an option in it, ``"options": [K texts]``. In rotation s, letter p shows option
        (p + s) mod K; there are 1 or K rotations.
    open
        ``{"id", "groups", "question", "answer": "words", "prediction": "words"}``
    vocabulary
        ``{"id", "groups", "question", "answer": "words", "scores": [V mean token log-likelihoods], "priors": [V, the
        same without video]}`` and maybe ``"prediction": "words"``
    rank_texts
        ``{"id", "labels": {...}, "scores": [C mean token log-likelihoods]}``
    rank_clips
        ``{"id", "groups": [at least one], "answer": 2, "scores": [n mean token log-likelihoods of the text]}``

``<benchmark>.texts.jsonl``, of vocabulary and rank_texts only, a row for each of the V or C texts in their order:
    ``{"text"}``, and in rank_texts ``"labels"`` and ``"prior": log-likelihood without video | null``.
    Labels are those of the benchmark's samples and candidates: Charades-Ego ``{"classes": [3, 77]}`` and
    ``{"class": 3}``, MIR ``{"verb": 0, "nouns": [2, 5]}`` for both.

Names of scores: a variant follows the metric, ``_partial`` follows that, and a group stands behind a slash:
``accuracy_likelihood_partial/intra``. **A score of fewer samples than the official file holds is always ``_partial``.**
``_likelihood`` is the plain mean log-likelihood L; a name without variant has the text's prior B taken off,
S = L - B (vocabulary, rank_texts), or is that of letters (choice) or L itself (rank_clips); ``_calibrated`` is
S - logsumexp of S over the texts of a clip. Samples whose answer is hidden count as not scored.
``accuracy_binary`` compares L of yes and no where one of them is right. ``parse_fail_rate`` and ``agreement`` (with the
letters of the first rotation; unreadable is not agreeing) are of the samples with ``said``, which are few by design.
``asked`` is the share of the official samples that have a row, given where that is not all.

Chance is that of a random scorer, but for ``em``, ``plain_acc`` and vocabularies the share of the most frequent answer:
the best that an answer without looking can do, far above 1/V.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.io.jsonl import is_text, require
from lightning_modules.egobench.metrics import (
    ChoiceAccuracy,
    ClassAveragePrecision,
    Estimate,
    MultiInstanceRetrieval,
    OpenAnswers,
    binomial_error,
    majority,
    normalise_answer,
    option_log_p,
)

Row = Mapping[str, Any]
Placed = tuple[str, Row]
"""A row and where it stands, for messages."""
Number = TypeVar("Number", np.float32, np.float64)


@dataclass(frozen=True)
class Score:
    """One number of one benchmark.

    Attributes:
        benchmark, metric: what was measured.
        value, standard_error, chance, n: as in ``Estimate``.
        total: samples or queries that n would be if all were scored; None where that is not known.
        unit: ``share``, in [0, 1] and shown in per cent, or ``points``, shown as they are.
    """

    benchmark: str
    metric: str
    value: float
    standard_error: float | None
    chance: float | None
    n: int
    total: int | None
    unit: Literal["share", "points"] = "share"


@dataclass(frozen=True)
class Header:
    """What is known of a whole predictions file; fields as in its JSON."""

    benchmark: str
    task: str
    total: int
    missing: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, record: Row, where: str) -> Header:
        """From a JSON object.

        Raises:
            ValueError: a field is missing or of another kind.
        """
        task = _words(record, "task", where)
        if task not in _TASKS:
            raise ValueError(f"{where}: field 'task' is {task!r}, expected one of {', '.join(_TASKS)}")
        total = require(dict(record), "total", where)
        if isinstance(total, bool) or not isinstance(total, int) or total < 1:
            raise ValueError(
                f"{where}: field 'total' is {total!r}, expected the number of samples in the official file"
            )
        missing, settings = record.get("missing", {}), record.get("settings", {})
        for name, value in (("missing", missing), ("settings", settings)):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: field {name!r} is {type(value).__name__}, expected an object")
        return cls(_words(record, "benchmark", where), task, total, missing, settings)

    def score(
        self,
        metric: str,
        number: Estimate,
        scored: int,
        unit: Literal["share", "points"] = "share",
        subset: bool = False,
    ) -> Score:
        """A number with its full name.

        Args:
            metric: name without ``_partial``, with the group.
            number: the number.
            scored: samples of the whole file that could count; fewer than ``total`` make the number a partial one.
            unit: as in ``Score``.
            subset: whether the number is not of all kinds of samples, as that of a group is not.
        """
        partial = scored < self.total
        base, slash, group = metric.partition("/")
        total = number.n if not partial else None if subset or group else self.total
        return Score(self.benchmark, f"{base}{'_partial' * partial}{slash}{group}", *number, total, unit)

    def asked(self, n: int) -> Score:
        """Share of the official samples that have a row."""
        return Score(self.benchmark, "asked", n / self.total, None, None, n, self.total)


def score(header: Row, rows: Iterable[Row], texts: Iterable[Row] = ()) -> list[Score]:
    """All scores of one benchmark, the same for any order of the rows.

    Args:
        header, rows, texts: contents of the three files.

    Raises:
        ValueError: names row, field and what to do.
    """
    return score_placed(
        Header.read(header, "header"),
        ((f"row {number}", row) for number, row in enumerate(rows, 1)),
        [(f"text {number}", row) for number, row in enumerate(texts, 1)],
    )


def score_placed(header: Header, rows: Iterable[Placed], texts: Sequence[Placed]) -> list[Score]:
    """``score`` with the places that messages name.

    Raises:
        ValueError: names place, field and what to do.
    """
    if bool(texts) != (header.task in ("vocabulary", "rank_texts")):
        said = "and the texts file is missing or empty" if not texts else "which has no texts file"
        raise ValueError(f"{header.benchmark}: task is {header.task}, {said}: evaluate the benchmark again")
    places: dict[str, str] = {}
    read = []
    for where, row in rows:
        sample = _TASKS[header.task][0](row, where, texts)
        if sample.id in places:
            raise ValueError(f"{where}: field 'id' is {sample.id!r} as in {places[sample.id]}: remove one of the two")
        if sample.id in header.missing:
            raise ValueError(
                f"{where}: field 'id' is {sample.id!r}, which the header lists as missing: take it off there"
            )
        places[sample.id] = where
        read.append(sample)
    if len(read) > header.total:
        raise ValueError(
            f"{header.benchmark}: {len(read)} rows, but the header's field 'total' is {header.total}: mend it"
        )
    read.sort(key=lambda sample: sample.id)
    scores = _TASKS[header.task][1](header, read, texts) if read else []
    if len(read) < header.total:
        scores.append(header.asked(len(read)))
    return scores


@dataclass(frozen=True)
class _Row:
    id: str
    where: str
    groups: Sequence[str] = ()
    answer: Any = None
    numbers: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    labels: Row = field(default_factory=dict)


def _read_choice(row: Row, where: str, texts: Sequence[Placed]) -> _Row:
    letters = _numbers(row, "letters", where, np.float64, dimensions=2)
    try:
        option_log_p(letters)
    except ValueError as error:
        raise ValueError(f"{where}: field 'letters' has {error}: evaluate the sample again") from None
    options = letters.shape[1]
    numbers = {"letters": letters}
    if "likelihood" in row:
        numbers["likelihood"] = _numbers(row, "likelihood", where, np.float64, options, "one for each option")[None]
    words = _names(row, "options", where) if "options" in row else []
    if words and len(words) != options:
        raise ValueError(
            f"{where}: field 'options' has {len(words)} texts, expected {options}: evaluate the sample again"
        )
    said = {"said": _words(row, "said", where)} if "said" in row else {}
    answer = require(dict(row), "answer", where)
    if answer is not None:
        answer = _choice_of(row, where, options)
    return _Row(_words(row, "id", where), where, _names(row, "groups", where), answer, numbers, said, words)


def _read_open(row: Row, where: str, texts: Sequence[Placed]) -> _Row:
    words = {name: _words(row, name, where) for name in ("question", "answer", "prediction")}
    return _Row(_words(row, "id", where), where, _names(row, "groups", where), words["answer"], words=words)


def _read_vocabulary(row: Row, where: str, texts: Sequence[Placed]) -> _Row:
    each = "one for each line of the texts file"
    numbers = {name: _numbers(row, name, where, np.float32, len(texts), each) for name in ("scores", "priors")}
    words = {
        name: _words(row, name, where)
        for name in ("question", "answer", "prediction")
        if name != "prediction" or name in row
    }
    return _Row(_words(row, "id", where), where, _names(row, "groups", where), words["answer"], numbers, words)


def _read_rank_texts(row: Row, where: str, texts: Sequence[Placed]) -> _Row:
    numbers = {"scores": _numbers(row, "scores", where, np.float32, len(texts), "one for each line of the texts file")}
    return _Row(_words(row, "id", where), where, numbers=numbers, labels=_labels(row, where))


def _read_rank_clips(row: Row, where: str, texts: Sequence[Placed]) -> _Row:
    numbers = {"scores": _numbers(row, "scores", where, np.float64)[None]}
    groups = _names(row, "groups", where)
    if not groups:
        raise ValueError(
            f"{where}: field 'groups' is empty, and only groups are scored: name the sample's, such as inter"
        )
    answer = _choice_of(row, where, numbers["scores"].shape[1])
    return _Row(_words(row, "id", where), where, groups, answer, numbers)


def _score_choice(header: Header, samples: Sequence[_Row], texts: Sequence[Placed]) -> list[Score]:
    scores = _accuracies(header, "accuracy", samples, "letters")
    scores += _accuracies(header, "accuracy_likelihood", samples, "likelihood")
    if checked := [sample for sample in samples if "said" in sample.words]:
        read = [
            read_choice(sample.words["said"], sample.numbers["letters"].shape[1], sample.options) for sample in checked
        ]
        shown = [int(sample.numbers["letters"][0].argmax()) for sample in checked]  # generation sees the first rotation
        rates = {
            "parse_fail_rate": sum(choice is None for choice in read) / len(checked),
            "agreement": sum(choice == letter for choice, letter in zip(read, shown, strict=True)) / len(checked),
        }
        for name, rate in rates.items():
            number = Estimate(rate, binomial_error(rate, len(checked)), None, len(checked))
            scores.append(Score(header.benchmark, name, *number, total=None))
    return scores


def _score_open(header: Header, samples: Sequence[_Row], texts: Sequence[Placed]) -> list[Score]:
    return [header.score(name, number, number.n) for name, number in _open_numbers(samples).items()]


def _score_vocabulary(header: Header, samples: Sequence[_Row], texts: Sequence[Placed]) -> list[Score]:
    vocabulary = [_words(row, "text", where) for where, row in texts]
    number_of = {text: number for number, text in enumerate(vocabulary)}
    if len(number_of) < len(vocabulary):
        raise ValueError(f"{header.benchmark}: the texts file holds a text twice: remove one")
    guess = _majority_by_group(samples)
    scores = []
    for name, prior_weight in (("accuracy", 1.0), ("accuracy_likelihood", 0.0)):
        metric = ChoiceAccuracy(sorted({group for sample in samples for group in sample.groups}), alone=True)
        for index, sample in enumerate(samples):
            corrected = sample.numbers["scores"] - prior_weight * sample.numbers["priors"]
            metric.update(index, corrected[None], number_of.get(sample.answer, -1), sample.groups)
        for key, number in metric.compute().items():
            group = key.partition("/")[2]
            scores.append(
                header.score(key.replace("accuracy", name), number._replace(chance=guess[group]), len(samples))
            )
    scores += _binary(header, samples, number_of)
    generated = [sample for sample in samples if "prediction" in sample.words]
    if generated:
        scores.append(header.score("em", _open_numbers(generated)["em"], len(generated)))
    return scores


def _binary(header: Header, samples: Sequence[_Row], number_of: Mapping[str, int]) -> list[Score]:
    sides = [n for side in ("yes", "no") for text, n in number_of.items() if normalise_answer(text) == side]
    asked = [sample for sample in samples if number_of.get(sample.answer) in sides]
    if len(sides) != 2 or not asked:
        return []
    metric = ChoiceAccuracy(alone=True)
    for index, sample in enumerate(asked):
        metric.update(index, sample.numbers["scores"][sides][None], sides.index(number_of[sample.answer]))
    number = metric.compute()["accuracy"]._replace(chance=majority(sample.answer for sample in asked))
    return [header.score("accuracy_binary", number, len(samples), subset=True)]


def _score_rank_texts(header: Header, samples: Sequence[_Row], texts: Sequence[Placed]) -> list[Score]:
    labels = [_labels(row, where) for where, row in texts]
    priors = [_prior(row, where) for where, row in texts]
    if len({prior is None for prior in priors}) > 1:
        where = texts[priors.index(None)][0]
        raise ValueError(f"{where}: field 'prior' is null, in other lines it is not: give all texts a prior, or none")
    prior = torch.tensor([0.0 if value is None else value for value in priors], dtype=torch.float64)
    likelihood = torch.from_numpy(np.stack([sample.numbers["scores"] for sample in samples]))
    rank = _rank_classes if "class" in labels[0] else _rank_relevant
    known = priors[0] is not None
    variants: dict[str, Callable[[], torch.Tensor]] = {"_likelihood": lambda: likelihood}
    if known:
        variants = {"": lambda: likelihood - prior, **variants}
    variants["_calibrated" if known else "_likelihood_calibrated"] = lambda: (likelihood - prior).log_softmax(dim=1)
    scores = []
    for variant, values in variants.items():
        for name, number in rank(values(), samples, texts, labels).items():
            scores.append(header.score(f"{name}{variant}", number, len(samples), subset=name.endswith("_t2v")))
    return scores


def _rank_classes(
    values: torch.Tensor, samples: Sequence[_Row], texts: Sequence[Placed], labels: Sequence[Row]
) -> dict[str, Estimate]:
    classes = [_integer(label, "class", where) for (where, _), label in zip(texts, labels, strict=True)]
    column = {number: position for position, number in enumerate(classes)}
    if len(column) < len(classes):
        raise ValueError(f"{texts[0][0]}: field 'labels' gives a class to two texts: remove one")
    target = torch.zeros(len(samples), len(classes), dtype=torch.bool)
    for row, sample in enumerate(samples):
        present = _integers(sample.labels, "classes", sample.where)
        if unknown := [number for number in present if number not in column]:
            raise ValueError(f"{sample.where}: field 'labels' has classes {unknown} that no text has: mend either file")
        target[row, [column[number] for number in present]] = True
    metric = ClassAveragePrecision(len(classes), alone=True)
    metric.update(torch.arange(len(samples)), values, target)
    found = metric.compute()
    if absent := round(found.pop("classes_without_positives").value):
        rank_zero_warn(f"{absent} of {len(classes)} classes occur in no scored clip and are left out of mAP")
    return found


def _rank_relevant(
    values: torch.Tensor, samples: Sequence[_Row], texts: Sequence[Placed], labels: Sequence[Row]
) -> dict[str, Estimate]:
    def split(all_labels: Iterable[tuple[str, Row]]) -> tuple[list[int], list[list[int]]]:
        both = [(_integer(label, "verb", where), _integers(label, "nouns", where)) for where, label in all_labels]
        return [verb for verb, _ in both], [nouns for _, nouns in both]

    text_verbs, text_nouns = split((where, label) for (where, _), label in zip(texts, labels, strict=True))
    verbs, nouns = split((sample.where, sample.labels) for sample in samples)
    count = 1 + max((noun for classes in (*nouns, *text_nouns) for noun in classes), default=0)
    metric = MultiInstanceRetrieval(text_verbs, text_nouns, count, alone=True)
    metric.update(torch.arange(len(samples)), values, verbs, nouns)
    return metric.compute()


def _score_rank_clips(header: Header, samples: Sequence[_Row], texts: Sequence[Placed]) -> list[Score]:
    return [number for number in _accuracies(header, "accuracy", samples, "scores") if "/" in number.metric]


_TASKS: dict[str, tuple[Callable[..., _Row], Callable[..., list[Score]]]] = {
    "choice": (_read_choice, _score_choice),
    "open": (_read_open, _score_open),
    "vocabulary": (_read_vocabulary, _score_vocabulary),
    "rank_texts": (_read_rank_texts, _score_rank_texts),
    "rank_clips": (_read_rank_clips, _score_rank_clips),
}


def read_choice(said: str, options: int, texts: Sequence[str] = ()) -> int | None:
    """Option that a generated answer names, read strictly.

    A letter in brackets (the opening one may be part of the prompt), or the answer is one letter, or it holds the words
    of exactly one option, not counting options whose words are part of another's. An answer that names two names none.

    Args:
        said: the answer.
        options: K.
        texts: words of the options, if known.
    """
    letters = "".join(chr(ord("A") + number) for number in range(options))
    either = f"[{letters}{letters.lower()}]"
    if named := {letters.index(found.upper()) for found in re.findall(rf"(?:^\s*|\()({either})\)", said)}:
        return named.pop() if len(named) == 1 else None
    if alone := re.fullmatch(rf"\W*({either})\W*", said):
        return letters.index(alone[1].upper())
    padded = {number: f" {normalise_answer(text)} " for number, text in enumerate(texts) if normalise_answer(text)}
    inside = {number: text for number, text in padded.items() if text in f" {normalise_answer(said)} "}
    longest = [n for n, text in inside.items() if not any(text != other and text in other for other in inside.values())]
    return longest[0] if len(longest) == 1 else None


def _accuracies(header: Header, name: str, samples: Sequence[_Row], numbers: str) -> list[Score]:
    scored = [sample for sample in samples if sample.answer is not None and numbers in sample.numbers]
    if not scored:
        return []
    metric = ChoiceAccuracy(sorted({group for sample in scored for group in sample.groups}), alone=True)
    for index, sample in enumerate(scored):
        metric.update(index, sample.numbers[numbers], sample.answer, sample.groups)
    found = metric.compute()
    return [header.score(key.replace("accuracy", name, 1), number, len(scored)) for key, number in found.items()]


def _open_numbers(samples: Sequence[_Row]) -> dict[str, Estimate]:
    said, right = [sample.words["prediction"] for sample in samples], [sample.words["answer"] for sample in samples]
    metric = OpenAnswers(alone=True)
    metric.update(range(len(samples)), said, right)
    found = metric.compute()
    for name, form in (("em", normalise_answer), ("plain_acc", str)):
        found[name] = found[name]._replace(chance=majority(right, form))
    return found


def _majority_by_group(samples: Sequence[_Row]) -> dict[str, float]:
    answers = defaultdict(list)
    for sample in samples:
        for group in ("", *sample.groups):
            answers[group].append(sample.answer)
    return {group: majority(given) for group, given in answers.items()}


def _words(row: Row, name: str, where: str) -> str:
    value = require(dict(row), name, where)
    if not is_text(value):
        raise ValueError(f"{where}: field {name!r} is {_short(value)}, expected text")
    return value


def _names(row: Row, name: str, where: str) -> list[str]:
    value = require(dict(row), name, where)
    if not isinstance(value, list | tuple) or not all(is_text(entry) for entry in value):
        raise ValueError(f"{where}: field {name!r} is {_short(value)}, expected a list of texts")
    return list(value)


def _labels(row: Row, where: str) -> Row:
    value = require(dict(row), "labels", where)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: field 'labels' is {_short(value)}, expected an object")
    return value


def _integer(row: Row, name: str, where: str) -> int:
    value = require(dict(row), name, f"{where} labels")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{where}: field {name!r} of the labels is {_short(value)}, expected a number from 0")
    return value


def _integers(row: Row, name: str, where: str) -> list[int]:
    value = require(dict(row), name, f"{where} labels")
    if not isinstance(value, list | tuple) or not all(type(entry) is int and entry >= 0 for entry in value):
        raise ValueError(f"{where}: field {name!r} of the labels is {_short(value)}, expected a list of numbers from 0")
    return list(value)


def _prior(row: Row, where: str) -> float | None:
    value = require(dict(row), "prior", where)
    return None if value is None else float(_numbers({"prior": [value]}, "prior", where, np.float64)[0])


def _choice_of(row: Row, where: str, options: int) -> int:
    value = require(dict(row), "answer", where)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < options:
        raise ValueError(f"{where}: field 'answer' is {_short(value)}, expected a number from 0 to {options - 1}")
    return value


def _numbers(
    row: Row,
    name: str,
    where: str,
    kind: type[Number],
    length: int | None = None,
    why: str = "",
    dimensions: int = 1,
) -> NDArray[Number]:
    value = require(dict(row), name, where)
    try:
        array = np.asarray(value, dtype=kind)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: field {name!r} is {_short(value)}, expected a list of numbers") from None
    if array.ndim != dimensions or not array.size:
        shape = "numbers" if dimensions == 1 else "lists of numbers"
        raise ValueError(f"{where}: field {name!r} is {_short(value)}, expected a list of {shape}")
    if length is not None and len(array) != length:
        raise ValueError(
            f"{where}: field {name!r} has {len(array)} numbers, expected {length}, {why}: evaluate the sample again"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: field {name!r} holds a value that is no finite number: evaluate the sample again")
    return array


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
