"""Benchmark metrics against the reference evaluators' numbers, by hand, and over ranks."""

import ast
import csv
import itertools
import multiprocessing
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.egobench.metrics import (
    ChoiceAccuracy,
    ClassAveragePrecision,
    MultiInstanceRetrieval,
    OpenAnswers,
    class_average_precision,
    expected_ap,
    normalise_answer,
    option_log_p,
    relevancy,
    rouge,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN, SAMPLES = SHARED / "golden" / "metrics_golden.npz", SHARED / "samples" / "benchmarks"
golden_only = pytest.mark.skipif(not GOLDEN.is_file(), reason=f"needs the reference values of {GOLDEN}")
samples_only = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"needs the annotations of {SAMPLES}")
DIRECTIONS = ("map_v2t", "map_t2v", "map", "ndcg_v2t", "ndcg_t2v", "ndcg")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def mir(scores, verbs, nouns, text_verbs, text_nouns, num_nouns=300):
    metric = MultiInstanceRetrieval(text_verbs, text_nouns, num_nouns)
    metric.update(torch.arange(len(scores)), torch.as_tensor(scores), verbs, nouns)
    return metric.compute()


def classes(scores, labels, draws=0):
    metric = ClassAveragePrecision(scores.shape[1], draws)
    metric.update(torch.arange(len(scores)), torch.as_tensor(scores), torch.as_tensor(labels))
    return metric.compute()


def golden_labels(golden):
    verbs = golden["mir_clip_verb"].tolist()
    nouns = [np.flatnonzero(row).tolist() for row in golden["mir_clip_noun_multihot"]]
    source = golden["mir_caption_source_clip"]
    return verbs, nouns, [verbs[clip] for clip in source], [nouns[clip] for clip in source]


def epic():
    with (SAMPLES / "epic100_mir" / "EPIC_100_retrieval_test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [int(row["verb_class"]) for row in rows], [ast.literal_eval(row["all_noun_classes"]) for row in rows]


def charades(name):
    with (SAMPLES / "charades_ego" / name).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = np.zeros((len(rows), 157), dtype=bool)
    for row, record in enumerate(rows):
        labels[row, [int(action.split()[0][1:]) for action in record["actions"].split(";") if action]] = True
    return labels


@golden_only
@pytest.mark.parametrize("case", ["random", "good", "perfect"])
def test_retrieval_equals_the_reference(golden, case):
    found = mir(golden[f"mir_{case}_sim"], *golden_labels(golden))
    assert [found[name].value for name in DIRECTIONS] == pytest.approx(golden[f"mir_{case}_map_ndcg"], abs=1e-9)


@golden_only
def test_relevancy_equals_the_reference(golden):
    verbs, _, text_verbs, _ = golden_labels(golden)
    hot = torch.from_numpy(golden["mir_clip_noun_multihot"]).bool()
    texts = torch.tensor(text_verbs), hot[torch.from_numpy(golden["mir_caption_source_clip"])]
    found = relevancy((torch.tensor(verbs), hot), texts)
    np.testing.assert_allclose(found, golden["mir_relevancy"], atol=1e-12)


@golden_only
@samples_only
def test_retrieval_on_the_first_400_real_clips(golden):
    verbs, nouns = epic()
    rows, columns = golden["ekreal_rows"], golden["ekreal_caption_row"][golden["ekreal_cols"]]
    labels = [[values[i] for i in chosen] for chosen in (rows, columns) for values in (verbs, nouns)]
    found = mir(golden["ekreal_sub_sim"], *labels)
    assert [found[name].value for name in DIRECTIONS] == pytest.approx(golden["ekreal_sub_map_ndcg"], abs=1e-6)


@golden_only
@samples_only
@pytest.mark.slow
def test_retrieval_on_all_real_clips_at_chance(golden):
    verbs, nouns = epic()
    source = golden["ekreal_caption_row"]
    scores = np.random.default_rng(0).standard_normal((len(verbs), len(source)))
    found = mir(scores, verbs, nouns, [verbs[i] for i in source], [nouns[i] for i in source])
    assert [found[name].value for name in DIRECTIONS] == pytest.approx(golden["ekreal_chance_seed0"], abs=1e-6)
    for name in DIRECTIONS:
        assert found[name].value == pytest.approx(found[name].chance, abs=2e-4)
    assert (found["map_v2t"].n, found["map_t2v"].n) == (9668, 3842)


def test_retrieval_by_hand():
    """Clip 0 sees relevance 1, 0.5, 0 in the order text 1, text 0, text 2 (0.5 of verb, whole nouns)."""
    found = mir(
        [[0.2, 0.9, 0.1], [0.0, 0.0, 1.0]],
        verbs=[0, 1],
        nouns=[[5], [6]],
        text_verbs=[0, 0, 1],
        text_nouns=[[4], [5], [6]],
    )
    # relevance: clip 0: 0.5, 1, 0; clip 1: 0, 0, 1. Both rank the relevant text first; clip 0 then has 0.5.
    assert found["map_v2t"].value == pytest.approx(1.0)
    assert found["ndcg_v2t"].value == pytest.approx(1.0)
    # text 0 has no clip of relevance 1 and is left out of AP; it ranks clip 0 (0.5) first.
    assert (found["map_t2v"].value, found["map_t2v"].n) == (pytest.approx(1.0), 2)
    assert (found["ndcg_t2v"].value, found["ndcg_t2v"].n) == (pytest.approx(1.0), 3)
    worse = mir([[0.9, 0.5, 0.1]], [0], [[5]], [0, 0, 1], [[4], [5], [6]])
    assert worse["map_v2t"].value == pytest.approx((0.5 + 1) / 2)  # graded: hits alone would give 1/2
    dcg, ideal = 0.5 + 1 / np.log2(3), 1 + 0.5 / np.log2(3)
    assert worse["ndcg_v2t"].value == pytest.approx(dcg / ideal)


def test_equal_similarities_keep_the_order_of_candidates():
    first = mir(np.zeros((1, 3)), [0], [[1]], [0, 1, 1], [[1], [2], [2]])
    last = mir(np.zeros((1, 3)), [0], [[1]], [1, 1, 0], [[2], [2], [1]])
    assert (first["map_v2t"].value, last["map_v2t"].value) == (1, pytest.approx(1 / 3))


def test_equal_similarities_keep_the_order_of_the_official_file():
    metric = MultiInstanceRetrieval([0], [[1]])
    metric.update(torch.tensor([7, 3]), torch.zeros(2, 1), [0, 1], [[1], [2]])  # sample 3 is the wrong one, and first
    assert metric.compute()["map_t2v"].value == 1 / 2
    many = mir(np.zeros((1, 4000)), [0], [[1]], [1] * 3999 + [0], [[2]] * 3999 + [[1]])
    assert many["map_v2t"].value == pytest.approx(1 / 4000)


def test_no_nouns_at_all_share_nothing():
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert relevancy((torch.tensor([0]), nothing), (torch.tensor([0]), nothing)).tolist() == [[0.5]]


def test_queries_without_anything_relevant_give_no_number():
    found = mir([[0.5, 0.1]], [0], [[1]], [0, 2], [[2], [3]])  # relevance 0.5 and 0
    assert list(found) == ["ndcg_v2t", "ndcg_t2v", "ndcg"]
    assert (found["ndcg_v2t"].n, found["ndcg_t2v"].n, found["ndcg"].n) == (1, 1, 1)
    assert list(classes(np.zeros((2, 3)), np.zeros((2, 3)), draws=5)) == ["classes_without_positives"]


def test_noun_classes_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"noun classes \[3, 12\], expected numbers below 12"):
        MultiInstanceRetrieval([0], [[3, 12]], num_nouns=12)


def test_chance_of_average_precision_is_the_mean_over_all_orders():
    relevance = np.array([1.0, 0.5, 1.0, 0.25, 0.0])
    values = []
    for order in itertools.permutations(relevance):
        ranked = np.array(order)
        hits = ranked == 1
        values.append((ranked.cumsum() / np.arange(1, 6) * hits).sum() / hits.sum())
    assert float(expected_ap(torch.tensor(relevance.sum()), 5)) == pytest.approx(np.mean(values), abs=1e-12)


@golden_only
@pytest.mark.parametrize("case", ["random", "good"])
def test_classes_equal_the_reference(golden, case):
    scores, labels = golden[f"charades_{case}_scores"], golden["charades_labels"]
    found = class_average_precision(torch.from_numpy(scores), torch.from_numpy(labels).bool())
    np.testing.assert_allclose(found, golden[f"charades_{case}_ap"], atol=1e-9)
    assert classes(scores, labels)["map"].value == pytest.approx(golden[f"charades_{case}_map"], abs=1e-9)


@golden_only
def test_clips_without_labels_go_last(golden):
    scores, labels = golden["charades_good_scores"], golden["charades_empty_labels"]
    value = classes(scores, labels)["map"].value
    assert value == pytest.approx(golden["charades_empty_map"], abs=1e-9)
    dropped = labels.any(1)
    assert classes(scores[dropped], labels[dropped])["map"].value == pytest.approx(value, abs=1e-12)


@golden_only
def test_classes_without_positives_are_left_out_and_counted(golden):
    found = classes(golden["charades_good_scores"], golden["charades_missing_labels"])
    assert found["map"].value == pytest.approx(golden["charades_missing_nanmean"], abs=1e-9)
    assert found["classes_without_positives"].value == 2
    ap = class_average_precision(
        torch.from_numpy(golden["charades_good_scores"]), torch.from_numpy(golden["charades_missing_labels"]).bool()
    )
    assert torch.isnan(ap).nonzero().flatten().tolist() == [3, 77]


@golden_only
@samples_only
@pytest.mark.parametrize(
    ("name", "key", "reference"),
    [("CharadesEgo_v0_egocentric_test.csv", "ego", "nanmean"), ("CharadesEgo_v0_test.csv", "pair", "map")],
)
def test_classes_on_real_labels(golden, name, key, reference):
    labels = charades(name)
    assert labels.sum(0).tolist() == golden[f"chreal_{key}_class_count"].tolist()
    scores = np.random.default_rng(3).standard_normal(labels.shape)
    found = classes(scores, labels)["map"]
    assert found.value == pytest.approx(golden[f"chreal_{key}_{reference}"], abs=1e-9)


@samples_only
@pytest.mark.parametrize("name", ["CharadesEgo_v0_egocentric_test.csv", "CharadesEgo_v0_test.csv"])
def test_random_scores_of_classes_land_on_chance(name):
    labels = charades(name)
    draws = [classes(np.random.default_rng(seed).standard_normal(labels.shape), labels)["map"] for seed in range(40)]
    values = np.array([draw.value for draw in draws])
    assert abs(values.mean() - draws[0].chance) < 4 * values.std() / np.sqrt(len(values))
    error = classes(np.random.default_rng(0).standard_normal(labels.shape), labels, draws=100)["map"].standard_error
    assert 0.5 * values.std() < error < 4 * values.std()


def test_classes_by_hand():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [1.0, 1.0]])
    labels = np.array([[0, 1], [1, 0], [1, 1], [0, 0]])
    # class 0: the unlabelled clip goes last, so positives are at ranks 2, 3; class 1: at 1, 3.
    assert classes(scores, labels)["map"].value == pytest.approx(((1 / 2 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2)
    tied = class_average_precision(torch.zeros(3, 2), torch.tensor([[True, False], [False, True], [True, False]]))
    assert tied.tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 2])  # in the order of the file


@golden_only
def test_letters_equal_the_definition(golden):
    log_p, answers = golden["mcq_logp"], golden["mcq_answer"].tolist()
    np.testing.assert_allclose([option_log_p(sample) for sample in log_p], golden["mcq_cyclic_logp"], atol=1e-12)
    for rotations, key in ((1, "single"), (4, "cyclic")):
        metric = ChoiceAccuracy()
        for index, (sample, answer) in enumerate(zip(log_p, answers, strict=True)):
            metric.update(index, sample[:rotations], answer)
        assert metric.compute()["accuracy"].value == pytest.approx(golden[f"mcq_acc_{key}"], abs=1e-9)


def test_rotations_by_hand():
    favours_first = np.array([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    assert option_log_p(favours_first).tolist() == [-2, -2, -2]
    content = np.array([[-3.0, -1.0, -2.0], [-1.0, -2.0, -3.0], [-2.0, -3.0, -1.0]])  # option 1, wherever it stands
    assert option_log_p(content).tolist() == [-3, -1, -2]
    with pytest.raises(ValueError, match="2 rotations of 3 options, expected 1 or 3"):
        option_log_p(content[:2])


@golden_only
def test_clip_choice_equals_the_reference(golden):
    metric = ChoiceAccuracy(("1", "2"))
    for index, (row, label, kind) in enumerate(
        zip(golden["egomcq_scores"], golden["egomcq_labels"], golden["egomcq_types"], strict=True)
    ):
        metric.update(index, row[None], int(label), [str(kind)])
    found = metric.compute()
    for kind in ("1", "2"):
        assert 100 * found[f"accuracy/{kind}"].value == pytest.approx(float(golden[f"egomcq_acc_type{kind}"]), abs=1e-9)


def test_accuracy_by_hand():
    metric = ChoiceAccuracy(("inter", "intra", "unseen"))
    metric.update(0, [[0.0, 0.0]], 0, ["inter"])  # a tie goes to the lower
    metric.update(1, [[0.0, 0.0]], 1, ["inter", "intra"])
    metric.update(2, [[0.0, 1.0, 0.0, 0.0]], 1)
    metric.update(3, [[0.0, 1.0, 0.0, 0.0]], -1)
    found = metric.compute()
    assert list(found) == ["accuracy", "accuracy/inter", "accuracy/intra"]
    assert found["accuracy"] == (0.5, 0.25, (0.5 + 0.5 + 0.25 + 0.25) / 4, 4)  # sqrt(0.5 * 0.5 / 4)
    assert found["accuracy/inter"] == (0.5, pytest.approx(0.125**0.5), 0.5, 2)
    with pytest.raises(ValueError, match=r"groups \['other'\] of sample 4 were not named"):
        metric.update(4, [[0.0, 1.0]], 1, ["other"])


@golden_only
def test_open_answers_equal_the_reference(golden):
    generated, right = golden["qa_pred"].tolist(), golden["qa_ref"].tolist()
    metric = OpenAnswers()
    metric.update(range(len(generated)), generated, right)
    found = metric.compute()
    means = [found[name].value for name in ("rouge1", "rouge2", "rougeL")]
    assert means == pytest.approx(golden["qa_rouge_mean_f"], abs=1e-9)
    assert 100 * found["bleu"].value == pytest.approx(float(golden["qa_corpus_bleu"]), abs=1e-9)
    assert found["plain_acc"].value == pytest.approx(float(golden["qa_plain_acc"]), abs=1e-12)
    each = [list(rouge(*pair).values()) for pair in zip(generated, right, strict=True)]
    np.testing.assert_allclose(each, golden["qa_rouge_prf"][:, :, 2], atol=1e-9)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Man's left-hand, on a TABLE.", "man s left hand on table"),
        ("Twenty-one apples; three (3) onions", "20 1 apples 3 3 onions"),
        ("theatre another anode", "theatre another anode"),
        ("A", ""),
    ],
)
def test_normalised_answers(text, normal):
    assert normalise_answer(text) == normal


def test_open_answers_by_hand():
    metric = OpenAnswers()
    metric.update([0, 1], ["The cup.", "red cup on the table"], ["a cup", "cup on table red"])
    found = metric.compute()
    assert found["em"] == (0.5, pytest.approx(0.125**0.5), None, 2)
    assert found["plain_acc"].value == 0
    assert found["rouge1"].value == pytest.approx((2 * 1 / 4 + 2 * 4 / 9) / 2)
    assert found["rougeL"].value == pytest.approx((2 * 1 / 4 + 2 * 3 / 9) / 2)  # cup on table


def test_bleu_smooths_missing_long_n_grams():
    metric = OpenAnswers()
    metric.update([0], ["one two three four"], ["one two three five"])  # 3/4, 2/3, 1/2, and 0/1 counted as 1/2
    assert metric.compute()["bleu"].value == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_bleu_of_short_answers_is_lowered():
    metric = OpenAnswers()
    metric.update([0], ["one two three four"], ["one two three four five six"])
    assert metric.compute()["bleu"].value == pytest.approx(np.exp(1 - 6 / 4))


def items(kind):
    """A metric with the arguments of each of its updates."""
    generator = np.random.default_rng(4)
    if kind == "choice":
        make = lambda: ChoiceAccuracy(("a", "b"))  # noqa: E731
        updates = [(i, generator.standard_normal((1, 4)), i % 4, ["ab"[i % 2]]) for i in range(23)]
    elif kind == "open":
        make = OpenAnswers
        words = generator.integers(5, size=(23, 2, 6)).astype(str)
        updates = [([i], [" ".join(generated)], [" ".join(right)]) for i, (generated, right) in enumerate(words)]
    elif kind == "retrieval":
        make = lambda: MultiInstanceRetrieval([0, 1, 2, 0], [[0], [1], [2], [1, 2]], 3)  # noqa: E731
        scores = torch.from_numpy(generator.integers(3, size=(23, 4)).astype(float))  # with ties
        updates = [(torch.tensor([i]), scores[i : i + 1], [i % 3], [[i % 3]]) for i in range(23)]
    else:
        make = lambda: ClassAveragePrecision(3, draws=20)  # noqa: E731
        scores = torch.from_numpy(generator.integers(3, size=(23, 3)).astype(float))
        labels = torch.from_numpy(generator.integers(2, size=(23, 3))).bool()
        updates = [(torch.tensor([i]), scores[i : i + 1], labels[i : i + 1]) for i in range(23)]
    return make, updates


KINDS = ("choice", "open", "retrieval", "classes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_splits_orders_and_repeats_change_nothing(kind, ranks):
    make, updates = items(kind)
    whole = make()
    for update in updates:
        whole.update(*update)
    shuffled = [updates[i] for i in np.random.default_rng(ranks).permutation(len(updates))]
    parts = [make() for _ in range(ranks)]
    for position, update in enumerate([*shuffled, *updates[:2]]):  # a sampler pads with repeats
        parts[position % ranks].update(*update)
    for part in parts[1:]:
        parts[0].merge_state(part)
    assert parts[0].compute() == whole.compute()
    whole.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert whole.compute() == {}


def test_processes_agree_even_those_without_items():
    """Three gloo processes, of which one has no sample at all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    processes = [spawn.Process(target=_process, args=(rank, port, queue)) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        found = [queue.get(timeout=120) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    whole = {}
    for kind in KINDS:
        make, updates = items(kind)
        metric = make()
        for update in updates:
            metric.update(*update)
        whole[kind] = metric.compute()
    assert found == [whole] * 3


def _process(rank, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    found = {}
    for kind in KINDS:
        make, updates = items(kind)
        metric = make()
        for update in updates[rank::2] if rank < 2 else []:
            metric.update(*update)
        found[kind] = metric.compute()
    queue.put({kind: {name: tuple(number) for name, number in numbers.items()} for kind, numbers in found.items()})
    torch.distributed.destroy_process_group()
