"""Numbers that Exo2Ego (arXiv 2503.09143) reports on EgoBench, for the paper column of tables."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Reported(NamedTuple):
    """One number of the paper.

    Attributes:
        value: in per cent, or in points.
        mark: a key of ``MARKS``, or "".
        unit: as of a ``Score``.
    """

    value: float
    mark: str = ""
    unit: Literal["share", "points"] = "share"


MARKS = {
    "*": "reported, protocol unknown: not comparable with ours, which follow the standard protocol",
    "†": "given by a judge model (gpt-3.5-turbo in the protocol it follows), not by a local metric",
}

PAPER = {
    ("egoschema", "accuracy"): Reported(61.3),
    ("qaego4d_closed", "accuracy"): Reported(62.1, "*"),
    ("qaego4d_open", "judge_acc"): Reported(28.3, "†"),
    ("qaego4d_open", "judge_score"): Reported(2.7, "†", "points"),
    ("egotaskqa_direct", "accuracy"): Reported(44.7, "*"),
    ("egotaskqa_indirect", "accuracy"): Reported(50.3, "*"),
    ("charades_ego", "map"): Reported(70.9, "*"),
    ("epic100_mir", "map"): Reported(49.7, "*"),
    ("epic100_mir", "ndcg"): Reported(63.6, "*"),
    ("egoplan", "accuracy"): Reported(42.7),
    ("vlnqa", "accuracy"): Reported(44.5),
    ("egomcq", "accuracy/inter"): Reported(88.4),
    ("egomcq", "accuracy/intra"): Reported(41.2),
}
"""By benchmark and metric. A judge's number stands under a name that no local metric has."""

AVERAGED = tuple(key for key in PAPER if key[0] != "qaego4d_open" and key != ("epic100_mir", "ndcg"))
"""The ten numbers whose plain mean is the paper's average of 55.6."""
