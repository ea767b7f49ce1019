"""Scores and the format of prediction files.

Every score can be computed again from three files per benchmark:

``<benchmark>.header.json``, one JSON object:
    ``benchmark``; ``task``: a name of ``lightning_modules.egobench.tasks.TASKS``; ``total``: samples in the official
    file; ``missing``: ``{id: why the sample was not evaluated}``; ``settings``: everything that the results depend on;
    ``invented``: true if the samples are of a generated world.

``<benchmark>.jsonl``, one row per evaluated sample, in any order. Each class in ``lightning_modules.egobench.tasks``
    documents the fields of its rows.

``<benchmark>.texts.jsonl``, only of tasks whose samples share candidates, one row per candidate in a fixed order:
    ``{"text"}``, and for ``rank_texts`` ``"labels"`` and ``"prior": log-likelihood without video | null``.

Names of scores: ``<metric><variant><_partial>/<group>``, for example ``accuracy_likelihood_partial/intra``. **A score
of fewer samples than the official file holds is always ``_partial``.** Variants: ``_likelihood`` is the plain mean
log-likelihood L; ``_calibrated`` is S - logsumexp of S over the candidates of a clip, with S = L - B and the prior B of
a candidate, its log-likelihood without video. A name without variant is S (``vocabulary``, ``rank_texts``), the
log-probabilities of letters (``choice``, ``cross_view``), or L (``rank_clips``). Samples whose answer is hidden are not
scored. ``asked`` is the fraction of the official samples that have a row, reported if that is not all.

Chance is that of random scores. For ``em``, ``plain_acc`` and vocabularies it is the fraction of the most frequent
answer instead, the best that a constant answer can reach, which is far above 1/V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, TypeAdapter

from datamodules.io.validate import Record, validate
from lightning_modules.egobench.fields import Row
from lightning_modules.egobench.metrics import Estimate


@dataclass(frozen=True)
class Score:
    """One number of one benchmark.

    Attributes:
        benchmark: name of the benchmark.
        metric: name of the score.
        value, standard_error, chance, n: as in ``Estimate``.
        total: samples or queries that n would be if all were scored; None if that is unknown.
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


class HeaderRecord(Record):
    """Content of a header file."""

    benchmark: str
    task: str
    total: int = Field(ge=1)
    missing: dict[str, str] = {}
    settings: dict[str, Any] = {}


_HEADER = TypeAdapter(HeaderRecord)


@dataclass(frozen=True)
class Header:
    """Description of a whole predictions file; the attributes are the fields of its JSON."""

    benchmark: str
    task: str
    total: int
    missing: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, record: Row, where: str) -> Header:
        """Parse a JSON object.

        Raises:
            ValueError: a field is missing or of another type.
        """
        parsed = validate(_HEADER, record, where)
        return cls(parsed.benchmark, parsed.task, parsed.total, parsed.missing, parsed.settings)

    def score(
        self,
        metric: str,
        estimate: Estimate,
        scored: int,
        unit: Literal["share", "points"] = "share",
        subset: bool = False,
    ) -> Score:
        """Return a score under its full name.

        Args:
            metric: name without ``_partial``, with the group.
            estimate: the number.
            scored: samples of the whole file that could count; fewer than ``total`` make the score a partial one.
            unit: as in ``Score``.
            subset: whether the score is of only one kind of samples although it is not that of a group.
        """
        partial = scored < self.total
        base, slash, group = metric.partition("/")
        total = estimate.n if not partial else None if subset or group else self.total
        return Score(self.benchmark, f"{base}{'_partial' * partial}{slash}{group}", *estimate, total, unit)

    def asked(self, n: int) -> Score:
        """Return the fraction of the official samples that have a row."""
        return Score(self.benchmark, "asked", n / self.total, None, None, n, self.total)
