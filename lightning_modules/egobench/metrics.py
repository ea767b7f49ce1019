"""Metrics of the benchmarks, exact for any distribution of the samples over processes.

Every metric keeps one row per sample with the sample's index in the official file, and sorts by that index before it
computes: neither the order of the samples nor a sampler's repeats can change a result. ``compute`` returns
``Estimate`` objects by name; fractions are in [0, 1].

Letters: `I` samples, `K` options, `R` rotations, `C` candidate texts or classes, `Q` queries.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

BLOCK = 256
"""Queries that are sorted together, the rows of the largest intermediate."""


class Estimate(NamedTuple):
    """One number.

    Attributes:
        value: of the metric.
        standard_error: of the mean over independent samples, or over queries; None where the number is no such mean.
        chance: expected value for random scores, unless the metric documents another.
        n: samples or queries that it is the mean of.
    """

    value: float
    standard_error: float | None
    chance: float | None
    n: int


def binomial_error(share: float, n: int) -> float:
    """Return the standard error sqrt(p (1 - p) / n) of a fraction of n independent samples."""
    return math.sqrt(max(share * (1 - share), 0.0) / n)


class _PerSample(Metric):
    """Base of metrics that keep rows by sample index; subclasses give the columns and append with ``_keep``.

    Args:
        alone: the rows are complete, so ``compute`` exchanges nothing with other processes.
        empty: no rows of each column.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, alone: bool = False, **empty: Tensor) -> None:
        super().__init__(sync_on_compute=not alone)
        self._empty = {"index": torch.zeros(0, dtype=torch.int64), **empty}
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        for name, empty in self._empty.items():  # a process without samples must still know kind and width of the rows
            getattr(self, name).append(empty.to(self.device))

    def _keep(self, **rows: Tensor) -> None:
        for name, value in rows.items():
            getattr(self, name).append(value.to(self.device, self._empty[name].dtype))

    def _kept(self) -> dict[str, Tensor]:
        columns = {}
        for name in self._empty:
            state = getattr(self, name)
            columns[name] = torch.cat(state) if isinstance(state, list) else state
        index, order = columns["index"].sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return {name: column[order[first]] for name, column in columns.items()}


def option_log_p(letters: np.ndarray) -> np.ndarray:
    """Return the log-probability of each option, averaged over rotations of the option list.

    Args:
        letters: float [R, K]; in rotation s, position p shows option (p + s) mod K. R is 1 or K.

    Returns:
        float64 [K].

    Raises:
        ValueError: another number of rotations, which would favour some options.
    """
    rotations, options = letters.shape
    if rotations not in (1, options):
        raise ValueError(f"{rotations} rotations of {options} options, expected 1 or {options}")
    position = (np.arange(options)[None] - np.arange(rotations)[:, None]) % options
    mean: np.ndarray = np.take_along_axis(letters.astype(np.float64), position, axis=1).mean(axis=0)
    return mean


class ChoiceAccuracy(_PerSample):
    """Fraction of samples whose highest option is the right one; the first of equal options counts as highest.

    It serves letters, option likelihoods, clips of one text (EgoMCQ: the published accuracy by type) and closed
    vocabularies. Chance is the mean of 1/K.

    Args:
        groups: names of all groups that samples can be in, the same in every process.
    """

    index: list[Tensor]
    right: list[Tensor]
    chance: list[Tensor]
    member: list[Tensor]

    def __init__(self, groups: Iterable[str] = (), alone: bool = False) -> None:
        self.groups = tuple(groups)
        number = torch.zeros(0, dtype=torch.float64)
        super().__init__(alone, right=number, chance=number, member=torch.zeros(0, len(self.groups), dtype=torch.bool))

    def update(self, index: int, letters: Any, answer: int, groups: Iterable[str] = ()) -> None:
        """Add one sample.

        Args:
            index: number of the sample in the official file.
            letters: float [R, K] as ``option_log_p`` takes it; [1, K] may be scores of any kind.
            answer: number of the right option; one that no option has, such as -1, makes every choice wrong.
            groups: groups that the sample also counts in.
        """
        scores = option_log_p(np.asarray(letters))
        inside = set(groups)
        if unknown := sorted(inside.difference(self.groups)):
            raise ValueError(f"groups {unknown} of sample {index} were not named when the metric was made")
        self._keep(
            index=torch.tensor([index]),
            right=torch.tensor([float(int(scores.argmax()) == answer)]),
            chance=torch.tensor([1 / len(scores)], dtype=torch.float64),
            member=torch.tensor([[group in inside for group in self.groups]], dtype=torch.bool),
        )

    def compute(self) -> dict[str, Estimate]:
        """Return ``accuracy`` and ``accuracy/<group>`` of the groups that occurred."""
        kept = self._kept()
        everything = torch.ones_like(kept["index"], dtype=torch.bool)
        subsets = {"accuracy": everything}
        subsets |= {f"accuracy/{group}": kept["member"][:, i] for i, group in enumerate(self.groups)}
        found = {}
        for name, subset in subsets.items():
            if n := int(subset.sum()):
                share = float(kept["right"][subset].mean())
                found[name] = Estimate(share, binomial_error(share, n), float(kept["chance"][subset].mean()), n)
        return found


class MultiInstanceRetrieval(_PerSample):
    """mAP and nDCG of EPIC-KITCHENS-100 multi-instance retrieval, clip to text, text to clip, and their mean.

    Relevance is 0.5 [same verb class] + 0.5 |N and M| / |N or M| with the sets N, M of noun classes. Of a query with
    relevance r_k at rank k among n candidates::

        AP   = sum_k [r_k = 1] (sum_{m <= k} r_m) / k  /  number of r = 1     (graded running sum, not one of hits)
        nDCG = sum_{k <= p} r_k / log2(k + 1)  /  the same of r sorted,        p = number of r > 0

    Ties keep the order of the candidates. Queries without a candidate of relevance 1 (AP) or above 0 (nDCG), which
    only a part of the benchmark has, are left out of the mean. Chance is the exact mean over all orders. The standard
    error is that of a mean over queries; the two directions share their pairs, so their mean has none. Formulas as in
    mwray/Joint-Part-of-Speech-Embeddings:src/evaluation/{mAP,nDCG}.py, the benchmark's reference.

    Args:
        verbs: verb class of each of the C texts.
        nouns: noun classes of each of the C texts.
        num_nouns: number of noun classes.
    """

    index: list[Tensor]
    scores: list[Tensor]
    verbs: list[Tensor]
    nouns: list[Tensor]
    text_verbs: Tensor
    text_nouns: Tensor

    def __init__(
        self, verbs: Sequence[int], nouns: Sequence[Sequence[int]], num_nouns: int = 300, alone: bool = False
    ) -> None:
        super().__init__(
            alone,
            scores=torch.zeros(0, len(verbs), dtype=torch.float64),
            verbs=torch.zeros(0, dtype=torch.int64),
            nouns=torch.zeros(0, num_nouns, dtype=torch.bool),
        )
        self.num_nouns = num_nouns
        self.register_buffer("text_verbs", torch.tensor(verbs, dtype=torch.int64), persistent=False)
        self.register_buffer("text_nouns", self._multi_hot(nouns), persistent=False)

    def update(self, index: Tensor, scores: Tensor, verbs: Sequence[int], nouns: Sequence[Sequence[int]]) -> None:
        """Add clips.

        Args:
            index: int [I], numbers of the clips in the official file.
            scores: float [I, C], higher is more alike.
            verbs: verb class of each clip.
            nouns: noun classes of each clip.
        """
        hot = self._multi_hot(nouns)
        self._keep(index=index, scores=scores, verbs=torch.tensor(verbs, dtype=torch.int64), nouns=hot)

    def compute(self) -> dict[str, Estimate]:
        """Return ``map_v2t``, ``map_t2v``, ``map``, and the same of ``ndcg``, if there are queries for them."""
        kept = self._kept()
        if not len(kept["index"]):
            return {}
        clips, texts = (kept["verbs"], kept["nouns"]), (self.text_verbs, self.text_nouns)
        v2t, t2v = _rank(kept["scores"], clips, texts), _rank(kept["scores"].T, texts, clips)
        found: dict[str, Estimate] = {}
        for name in ("map", "ndcg"):
            directions = {
                f"{name}_v2t": _mean_of_queries(v2t[name], v2t[f"{name}_chance"]),
                f"{name}_t2v": _mean_of_queries(t2v[name], t2v[f"{name}_chance"]),
            }
            known = {direction: number for direction, number in directions.items() if number is not None}
            found |= known
            if len(known) == 2:
                value, chance = (sum(getattr(k, part) for k in known.values()) / 2 for part in ("value", "chance"))
                found[name] = Estimate(value, None, chance, len(kept["index"]))
        return found

    def _multi_hot(self, nouns: Sequence[Sequence[int]]) -> Tensor:
        hot = torch.zeros(len(nouns), self.num_nouns, dtype=torch.bool)
        for row, classes in enumerate(nouns):
            if classes and not 0 <= min(classes) <= max(classes) < self.num_nouns:
                raise ValueError(f"noun classes {list(classes)}, expected numbers below {self.num_nouns}")
            hot[row, list(classes)] = True
        return hot


def relevancy(queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor]) -> Tensor:
    """Return the relevance of ``MultiInstanceRetrieval``.

    Args:
        queries, candidates: verb classes int [Q] and multi-hot noun classes bool [Q, nouns]; the same of candidates.

    Returns:
        float64 [Q, C] in [0, 1].
    """
    (verbs, nouns), (other_verbs, other_nouns) = queries, candidates
    nouns, other_nouns = nouns.float(), other_nouns.float()  # counts below 2**24 are exact
    both = (nouns @ other_nouns.T).double()
    either = nouns.sum(1, dtype=torch.float64)[:, None] + other_nouns.sum(1, dtype=torch.float64)[None] - both
    same_verb = (verbs[:, None] == other_verbs[None]).double()
    return 0.5 * same_verb + 0.5 * both / either.clamp(min=1)


def _rank(scores: Tensor, queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return AP and nDCG of every query with their chance, each float64 [Q]; NaN for a query without any."""
    n = scores.shape[1]
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=scores.device)
    discount = (rank + 1).log2().reciprocal()
    blocks = []
    for start in range(0, len(scores), BLOCK):
        rows = slice(start, start + BLOCK)
        relevance = relevancy((queries[0][rows], queries[1][rows]), candidates)
        ranked = relevance.gather(1, scores[rows].argsort(dim=1, descending=True, stable=True))
        hits = (ranked == 1).double()
        count, total = hits.sum(1), ranked.sum(1)
        gain = discount * (rank <= (ranked > 0).sum(1, keepdim=True))
        ideal = (relevance.sort(dim=1, descending=True).values * gain).sum(1)
        blocks.append(
            {
                "map": (ranked.cumsum(1) / rank * hits).sum(1) / count,
                "map_chance": torch.where(count > 0, expected_ap(total, n), torch.nan),
                "ndcg": (ranked * gain).sum(1) / ideal,
                "ndcg_chance": total / n * gain.sum(1) / ideal,
            }
        )
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def expected_ap(total: Tensor, n: int) -> Tensor:
    """Return the mean average precision over all orders of n candidates whose relevance sums to ``total``.

    A relevant candidate is at each rank k equally often, and then (k - 1) / (n - 1) of all other relevance is before
    it: the mean of (1 + (k - 1) (total - 1) / (n - 1)) / k. With relevance 0 or 1 this is ordinary AP.
    """
    harmonic = sum(1 / k for k in range(1, n + 1)) / n
    return harmonic + (total - 1) / max(n - 1, 1) * (1 - harmonic)


def _mean_of_queries(values: Tensor, chance: Tensor) -> Estimate | None:
    known = values[~values.isnan()]
    if not len(known):
        return None
    error = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else None
    return Estimate(float(known.mean()), error, float(chance.nanmean()), len(known))


class ClassAveragePrecision(_PerSample):
    """mAP of Charades-Ego: clips ranked for each class, then the mean over classes.

    AP_c is the sum over positives of the precision at their rank, by their number. Clips without any label go last.
    Classes without a positive are left out of the mean. Equal scores keep the order of the official file. Chance is
    the exact mean over all orders; the standard error is that of ``draws`` seeded draws of clips with replacement.
    As gsig/charades-algorithms:pytorch/utils/map.py.

    Args:
        num_classes: C.
        draws: of the standard error.
    """

    index: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, draws: int = 200, alone: bool = False) -> None:
        super().__init__(
            alone,
            scores=torch.zeros(0, num_classes, dtype=torch.float64),
            labels=torch.zeros(0, num_classes, dtype=torch.bool),
        )
        self.draws = draws

    def update(self, index: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Add clips.

        Args:
            index: int [I], numbers of the clips in the official file.
            scores: float [I, C], higher is more likely.
            labels: [I, C], whether the class occurs in the clip.
        """
        self._keep(index=index, scores=scores, labels=labels)

    def compute(self) -> dict[str, Estimate]:
        """Return ``map`` and its number of clips, if any class occurs, and the count ``classes_without_positives``."""
        kept = self._kept()
        scores, labels = kept["scores"], kept["labels"]
        if not len(scores):
            return {}
        positives, ranked = labels.sum(0).double(), int(labels.any(1).sum())
        present = positives > 0
        found = {"classes_without_positives": Estimate(int((~present).sum()), None, None, len(present))}
        if ranked:
            chance = float(expected_ap(positives[present], ranked).mean())
            value = float(class_average_precision(scores, labels).nanmean())
            found["map"] = Estimate(value, self._error(scores, labels), chance, len(scores))
        return found

    def _error(self, scores: Tensor, labels: Tensor) -> float | None:
        if self.draws < 2 or len(scores) < 2:
            return None
        generator = np.random.default_rng(0)
        drawn = [torch.from_numpy(generator.integers(len(scores), size=len(scores))) for _ in range(self.draws)]
        means = [class_average_precision(scores[d], labels[d]).nanmean() for d in drawn if labels[d].any()]
        return float(torch.stack(means).std()) if len(means) > 1 else None


def class_average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the AP of each class, float64 [C], NaN without a positive, by the rules of ``ClassAveragePrecision``."""
    scores = scores.double().masked_fill(~labels.any(1, keepdim=True), -torch.inf)
    hits = labels.gather(0, scores.argsort(dim=0, descending=True, stable=True)).double()
    rank = torch.arange(1, len(hits) + 1, dtype=torch.float64, device=hits.device)[:, None]
    return (hits.cumsum(0) / rank * hits).sum(0) / hits.sum(0)


NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}


def normalise_answer(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, with number words to twenty as digits."""
    words = re.sub(r"[^\w\s]|_", " ", text.lower()).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))


class OpenAnswers(_PerSample):
    """Short answers in words against one reference.

    ``em``: equal after ``normalise_answer``. ``plain_acc``: equal as they are (QaEgo4D). ``rouge1``, ``rouge2``,
    ``rougeL``: F of ``rouge``. ``bleu``: BLEU of the corpus as sacreBLEU computes it (tokens "13a", exponential
    smoothing). Chance of the first two is the most frequent answer, given for every sample.
    """

    MEANS = ("em", "plain_acc", "rouge1", "rouge2", "rougeL")

    index: list[Tensor]
    rows: list[Tensor]

    def __init__(self, alone: bool = False) -> None:
        super().__init__(alone, rows=torch.zeros(0, len(self.MEANS) + 10, dtype=torch.float64))

    def update(self, index: Sequence[int], predictions: Sequence[str], answers: Sequence[str]) -> None:
        """Add samples: their indices in the official file, the generated answers and the references."""
        rows = [self._row(prediction, answer) for prediction, answer in zip(predictions, answers, strict=True)]
        self._keep(index=torch.tensor(list(index)), rows=torch.tensor(rows, dtype=torch.float64))

    def compute(self) -> dict[str, Estimate]:
        """Return all metrics named above, without chance, which needs the words."""
        rows = self._kept()["rows"]
        n = len(rows)
        if not n:
            return {}
        found = {}
        for name, column in zip(self.MEANS, rows.T, strict=False):
            error = float(column.std(correction=0)) / math.sqrt(n)  # of zeros and ones: sqrt(p (1 - p) / n)
            found[name] = Estimate(float(column.mean()), error, None, n)
        found["bleu"] = Estimate(_bleu(rows[:, len(self.MEANS) :].sum(0).tolist()), None, None, n)
        return found

    def _row(self, prediction: str, answer: str) -> list[float]:
        equal = normalise_answer(prediction) == normalise_answer(answer)
        scores = [equal, prediction == answer, *rouge(prediction, answer).values()]
        return [*map(float, scores), *map(float, _bleu_counts(prediction, answer))]


# torchmetrics' ROUGE returns float32, 3e-8 from the golden values that are kept to 1e-9.
def rouge(prediction: str, reference: str) -> dict[str, float]:
    """Return F of ROUGE-1, -2 and -L over lower-case words of a-z and 0-9, without stemming, as rouge_score does."""
    predicted, expected = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))

    def f(common: int, shorter_by: int = 0) -> float:
        total = len(predicted) + len(expected) - 2 * shorter_by
        return 2 * common / total if common else 0.0

    overlaps = {n: sum((_grams(predicted, n) & _grams(expected, n)).values()) for n in (1, 2)}
    longest = _longest_common_subsequence(predicted, expected)
    return {"rouge1": f(overlaps[1]), "rouge2": f(overlaps[2], 1), "rougeL": f(longest)}


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        above = lengths
        lengths = [0]
        for position, other in enumerate(second):
            lengths.append(above[position] + 1 if word == other else max(above[position + 1], lengths[-1]))
    return lengths[-1]


# sacreBLEU gives the same number, but would bring five packages (lxml among them) for the 40 lines below.
_MARKS = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}


def _bleu_words(text: str) -> list[str]:
    """Split a text into tokens "13a" of mteval, as sacreBLEU does."""
    for mark, meaning in _MARKS.items():
        text = text.replace(mark, meaning)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def _bleu_counts(prediction: str, reference: str) -> list[int]:
    """Return the common and the predicted n-grams for n = 1 to 4, then the two lengths."""
    predicted, expected = _bleu_words(prediction), _bleu_words(reference)
    common = [sum((_grams(predicted, n) & _grams(expected, n)).values()) for n in range(1, 5)]
    total = [max(len(predicted) - n + 1, 0) for n in range(1, 5)]
    return [*common, *total, len(predicted), len(expected)]


def _bleu(counts: Sequence[float]) -> float:
    common, total, (predicted, expected) = counts[:4], counts[4:8], counts[8:]
    if not common[0] or not all(total):
        return 0.0
    logs, smooth = 0.0, 1.0
    for hits, grams in zip(common, total, strict=True):
        smooth = smooth if hits else 2 * smooth
        logs += math.log((hits or 1 / smooth) / grams)
    return math.exp(logs / 4 + min(0.0, 1 - expected / predicted))


def majority(answers: Iterable[str], form: Callable[[str], str] = str) -> float:
    """Return the fraction of the most frequent answer, the best score of a constant answer."""
    counts = Counter(map(form, answers))
    return counts.most_common(1)[0][1] / sum(counts.values())
