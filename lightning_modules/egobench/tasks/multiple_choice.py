"""Multiple choice: EgoSchema, QAEgo4D closed, EgoPlan, VLN-QA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, TypeAdapter

from datamodules.batch import Request
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Sample
from datamodules.io.validate import Record, validate
from lightning_modules.egobench.fields import Index, Numbers, PlacedRow, Row, check_answer, to_array
from lightning_modules.egobench.metrics import Estimate, binomial_error, normalise_answer, option_log_p
from lightning_modules.egobench.scores import Header, Score
from lightning_modules.egobench.tasks.base import Prediction, Result, Task, accuracies, requested

CROSS_CHECK_TOKENS = 8


class ChoiceRow(Record):
    """A row of ``MultipleChoice``."""

    id: str
    groups: Sequence[str]
    answer: Index | None
    letters: Annotated[list[Numbers], Field(min_length=1)]
    likelihood: Numbers | None = None
    options: Sequence[str] = ()
    generated: str | None = Field(default=None, alias="said")


_ROW = TypeAdapter(ChoiceRow)


class MultipleChoice(Task):
    """Choose one of the sample's options.

    Row: ``{"id", "groups": [...], "answer": 2 | null, "options": [K texts], "letters": [[K log-probabilities] for each
    rotation], "likelihood": [K mean token log-likelihoods of the options' texts]}`` and, for the samples of the
    cross-check, ``"said": "the generated answer"``. In rotation s, letter p shows option (p + s) mod K; there are 1 or
    K rotations. ``options`` and ``likelihood`` may be absent.

    Scores: ``accuracy`` of the letters, ``accuracy_likelihood`` of the texts, both also by group. Of the samples with
    ``said``: ``parse_fail_rate``, and ``agreement`` with the letters of the first rotation; an answer that cannot be
    parsed does not agree.
    """

    name: ClassVar[str] = "choice"
    cross_checks: ClassVar[bool] = True

    def requests(self, sample: Sample, encoder: RequestEncoder, cross_check: bool) -> dict[str, Request]:
        """Ask for the letters, for the likelihood of each option's text, and for some samples for a short answer."""
        requests: dict[str, Request] = {
            "letters": encoder.letters(sample),
            "likelihood": encoder.loglikelihood(encoder.prompts.open(sample), sample.options),
        }
        if cross_check:
            requests["said"] = encoder.generate_until(encoder.prompts.choice(sample), CROSS_CHECK_TOKENS)
        return requests

    def row(self, sample: Sample, results: Sequence[Result]) -> dict[str, Any]:
        """Return the row described above."""
        known = {"id": sample.id, "groups": sample.groups, "answer": sample.answer, "options": sample.options}
        return known | requested(results[0])

    def parse(self, row: Row, where: str, candidates: Sequence[PlacedRow]) -> Prediction:
        """Validate a row."""
        parsed = validate(_ROW, row, where)
        lengths = {len(rotation) for rotation in parsed.letters}
        if len(lengths) != 1:
            raise ValueError(f"{where}: field 'letters' has rotations of different lengths: evaluate the sample again")
        letters = np.asarray(parsed.letters, dtype=np.float64)
        try:
            option_log_p(letters)
        except ValueError as error:
            raise ValueError(f"{where}: field 'letters' has {error}: evaluate the sample again") from None
        (count,) = lengths
        scores = {"letters": letters}
        if parsed.likelihood is not None:
            likelihood = to_array(parsed.likelihood, "likelihood", where, np.float64, count, "one for each option")
            scores["likelihood"] = likelihood[None]
        if parsed.options and len(parsed.options) != count:
            raise ValueError(
                f"{where}: field 'options' has {len(parsed.options)} texts, expected {count}: evaluate the sample again"
            )
        if parsed.answer is not None:
            check_answer(parsed.answer, count, where)
        texts = {} if parsed.generated is None else {"said": parsed.generated}
        return Prediction(parsed.id, where, parsed.groups, parsed.answer, scores, texts, parsed.options)

    def score(self, header: Header, predictions: Sequence[Prediction], candidates: Sequence[PlacedRow]) -> list[Score]:
        """Compute the scores described above."""
        scores = accuracies(header, "accuracy", predictions, "letters")
        scores += accuracies(header, "accuracy_likelihood", predictions, "likelihood")
        checked = [each for each in predictions if "said" in each.texts]
        if checked:
            scores += self._cross_check(header, checked)
        return scores

    @staticmethod
    def _cross_check(header: Header, checked: Sequence[Prediction]) -> list[Score]:
        failed = agreeing = 0
        for each in checked:
            choice = parse_choice(each.texts["said"], each.scores["letters"].shape[1], each.options)
            failed += choice is None
            agreeing += choice == int(each.scores["letters"][0].argmax())  # generation sees the first rotation
        scores = []
        for name, count in (("parse_fail_rate", failed), ("agreement", agreeing)):
            rate = count / len(checked)
            estimate = Estimate(rate, binomial_error(rate, len(checked)), None, len(checked))
            scores.append(Score(header.benchmark, name, *estimate, total=None))
        return scores

    @staticmethod
    def chosen_option(row: Row) -> int:
        """Return the index of the option that the letters of a row choose."""
        return int(option_log_p(np.array(row["letters"])).argmax())


_EXPLANATION = re.compile(r"\b(?:because|since|due to|given that)\b.*", re.IGNORECASE | re.DOTALL)


def parse_choice(answer: str, num_options: int, options: Sequence[str] = ()) -> int | None:
    """Return the option that a generated answer names, parsed strictly; None if it names none or several.

    The answer names an option by its letter: as the answer ("Answer: B", "the answer is (B)"), at its start ("B, ...",
    "B) ..."; the opening bracket may be part of the prompt), or anywhere in brackets; or else by holding the words of
    exactly one option. Letters that the answer rejects ("not (A)", "(A) is wrong") and, except after "answer", those
    of an explanation ("because ...") do not count. Options whose words are part of another's do not count if the
    longer one is there.

    Args:
        answer: the generated text.
        num_options: K.
        options: texts of the options, if known.
    """
    letters = "".join(chr(ord("A") + number) for number in range(num_options))
    one = rf"\(?\b([{letters}{letters.lower()}])\b\)?"
    # Without its brackets, a letter before a word may be an article: "the answer is a dog", "A dog".
    ends = r"(?!['\u2019-])(?=\s*(?:$|[^\s\w(])|\s+(?:because|since|as|is|or|and)\b|(?<=\))|\s*\()"
    wrong = r"\s+(?:is|are)\s+(?:not|wrong|incorrect|false|impossible|ruled out)\b"
    refused = r"\b(?:not|isn['\u2019]t|rather than|instead of|than)\s+(?:option\s+)?"
    rejected = rf"{refused}{one}{ends}|{one}{wrong}"
    kept = re.sub(rejected, " ", answer, flags=re.IGNORECASE)
    before = _EXPLANATION.sub("", kept)
    declared = rf"\banswer\b(?:\s+(?:is|would be|should be|must be))?\W*?(?:option\s+)?{one}{ends}"
    first = rf"\s*(?:\W*(?:best |correct |right )?(?:option|choice)(?:\s+is)?\W*?)?{one}{ends}"
    named = _letters(re.finditer(declared, kept, re.IGNORECASE), kept, one)
    named |= _letters(filter(None, [re.match(first, before, re.IGNORECASE)]), before, one)
    named = named or set(re.findall(rf"(?:^\s*|\()([{letters}{letters.lower()}])\)", before))
    indices = {letters.index(letter.upper()) for letter in named}
    if indices:
        return indices.pop() if len(indices) == 1 else None
    # Spaces around both keep "cup" from being found in "cupboard".
    spaced_answer = f" {normalise_answer(before)} "
    inside: dict[int, str] = {}
    for number, text in enumerate(options):
        spaced = f" {normalise_answer(text)} "
        if spaced.strip() and spaced in spaced_answer:
            inside[number] = spaced
    longest = []
    for number, text in inside.items():
        if not any(text != other and text in other for other in inside.values()):
            longest.append(number)
    return longest[0] if len(longest) == 1 else None


def _letters(found: Iterable[re.Match[str]], text: str, one: str) -> set[str]:
    """Return the letters of some matches, each with those that it is listed with, as in "A or B"."""
    letters = set()
    for match in found:
        letters.add(match[1])
        end, following = match.end(), re.compile(rf"\s*(?:,|/|&|\bor\b|\band\b)\s*{one}(?![\w'\u2019-])")
        while more := following.match(text, end):
            letters.add(more[1])
            end = more.end()
    return letters
