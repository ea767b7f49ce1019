"""Compare continuations that share a prefix with each of them alone."""

import pytest
import torch
from test_language_model import EOS, OVERRIDES, build, spliced_row, visual_tokens

from datamodules.batch import BenchmarkBatch, GenerateUntilRequest, Instance, LoglikelihoodRequest
from datamodules.text import load_tokenizer
from lightning_modules.egobench.evaluator import Evaluator
from lightning_modules.model.language_model import VIDEO_TOKEN_ID as V
from lightning_modules.model.lora import LoRAConfig, add_lora
from lightning_modules.model.prefix_cache import SharedPrefix, _passes

PROMPT = [1, V, 5, 6]
ROWS = [(7, 8, EOS), (7, 8, 9, EOS), (10, EOS), (EOS,), (7, 8, EOS), (11, 12, 13, 14, 15, EOS), (7, 9, EOS)]


def embeds(model, ids=PROMPT):
    return spliced_row(model, ids, visual_tokens(1)[0])


def alone(model, row):
    """Return log p of a row by a forward pass of its own, without any cache."""
    prompt = embeds(model)
    logits = model.causal_lm(inputs_embeds=torch.cat([prompt, model.embed(torch.tensor(row))])[None]).logits[0]
    log_p = logits.log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + n, token] for n, token in enumerate(row))


@pytest.fixture(params=list(OVERRIDES))
def model(request):
    with torch.no_grad():
        yield build(request.param)


@pytest.mark.parametrize("tokens_a_pass", [1, 7, 23])
def test_packed_scores_equal_those_of_each_row_alone(model, tokens_a_pass):
    prefix = SharedPrefix(model, embeds(model), tokens_a_pass)
    expected = torch.stack([alone(model, row) for row in ROWS])
    for _ in range(2):  # the first call leaves the prefix as it was
        torch.testing.assert_close(prefix.log_likelihoods(ROWS), expected, atol=1e-5, rtol=0)


def test_packed_scores_with_adapters_equal_those_of_each_row_alone(model):
    add_lora(model.causal_lm, LoRAConfig(rank=4, alpha=8, dropout=0.5))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    model.eval()
    expected = torch.stack([alone(model, row) for row in ROWS])
    torch.testing.assert_close(SharedPrefix(model, embeds(model)).log_likelihoods(ROWS), expected, atol=1e-5, rtol=0)


def test_next_logits_equal_a_full_forward(model):
    prefix = SharedPrefix(model, embeds(model), tokens_a_pass=4)
    rows = [(), (7, 8), (7,), (9, 9, 9, 9, 9), ()]
    for row, logits in zip(rows, prefix.next_logits(rows), strict=True):
        full = model.causal_lm(inputs_embeds=embeds(model, [*PROMPT, *row])[None]).logits[0, -1]
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)


def test_logits_that_are_compared_are_not_rounded_to_bfloat16(model):
    with torch.autocast("cpu", torch.bfloat16):
        logits = SharedPrefix(model, embeds(model)).next_logits([(7, 8), ()])
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).float().mean() > 0.9


def test_an_extended_prefix_scores_as_a_longer_one_and_is_short_again_afterwards(model):
    prefix = SharedPrefix(model, embeds(model))
    before = prefix.log_likelihoods(ROWS)
    with prefix.extended([16, 17]):
        longer = SharedPrefix(model, embeds(model, [*PROMPT, 16, 17])).log_likelihoods(ROWS)
        torch.testing.assert_close(prefix.log_likelihoods(ROWS), longer, atol=1e-5, rtol=0)
        assert not torch.allclose(longer, before, atol=1e-2)
    torch.testing.assert_close(prefix.log_likelihoods(ROWS), before, atol=1e-5, rtol=0)


def test_greedy_answers_equal_those_of_transformers(model):
    ids, mask = torch.tensor([PROMPT]), torch.ones(1, len(PROMPT), dtype=torch.bool)
    (full,) = model.generate(ids, mask, visual_tokens(1), 12, eos_token_id=-1, pad_token_id=0)
    prefix = SharedPrefix(model, embeds(model))
    before = prefix.log_likelihoods(ROWS)
    assert prefix.greedy(12, end=-1) == full
    assert prefix.greedy(12, end=full[4]) == full[: full.index(full[4])]
    torch.testing.assert_close(prefix.log_likelihoods(ROWS), before, atol=1e-5, rtol=0)


def answers_alone(prefix, rows, end, max_new_tokens=10):
    answers = []
    for row in rows:
        with prefix.extended(row) as context:
            answers.append(context.greedy(max_new_tokens, end))
    return answers


@pytest.mark.parametrize("tokens_a_pass", [4, 1024])
def test_rows_that_are_decoded_together_continue_as_each_alone(model, tokens_a_pass):
    prefix = SharedPrefix(model, embeds(model), tokens_a_pass)
    before = prefix.log_likelihoods(ROWS)
    rows = [(), (7, 8), (7, 8, 9), (10,), (7, 8), (11, 12, 13, 14, 15)]
    endless = answers_alone(prefix, rows, end=-1)
    assert prefix.greedy_each(rows, 10, end=-1) == endless
    end = endless[1][3]  # some rows stop before others
    stopped = answers_alone(prefix, rows, end)
    assert prefix.greedy_each(rows, 10, end) == stopped
    assert prefix.greedy_each(rows, 1, end=-1) == [answer[:1] for answer in endless]
    assert len({len(answer) for answer in stopped}) > 1
    torch.testing.assert_close(prefix.log_likelihoods(ROWS), before, atol=1e-5, rtol=0)


def test_generated_answers_of_a_benchmark_are_those_of_each_request_alone(toy_tokenizer):
    evaluator = Evaluator(build("mistral"), load_tokenizer(str(toy_tokenizer)))
    visual = visual_tokens(1)[0]
    limits = {(7, 8): 6, (9,): 3, (10, 11, 12): 6, (7,): 6}
    requests = [GenerateUntilRequest(context, limit) for context, limit in limits.items()]
    choices = LoglikelihoodRequest((5,), ((6, EOS), (7, EOS)))
    instances = [Instance(str(n), 0, {"scores": choices, "text": each}) for n, each in enumerate(requests)]
    together = evaluator.evaluate(BenchmarkBatch((1,), instances), [visual])
    assert together == [evaluator.evaluate(BenchmarkBatch((1,), [each]), [visual])[0] for each in instances]
    assert len({row["text"] for row in together}) > 2
    with pytest.raises(ValueError, match="the batch has no clip"):
        evaluator.evaluate(BenchmarkBatch((1,), [Instance("0", 0, {"text": requests[0]})]), [])


@pytest.mark.parametrize("window", [3, 9])
def test_rows_that_are_decoded_together_have_a_sliding_window_each(window):
    with torch.no_grad():
        model = build("mistral")
        model.causal_lm.config.sliding_window = window
        prefix = SharedPrefix(model, embeds(model))
        rows = [(7, 8), (7, 8, 9), (10,), (11, 12, 13, 14, 15)]
        assert prefix.greedy_each(rows, 10, end=-1) == answers_alone(prefix, rows, end=-1)


@pytest.mark.parametrize("window", [3, 9, 10])
def test_a_sliding_window_is_that_of_each_row_alone(window):
    """The tree of all rows has more tokens than the window, none of them is as deep."""
    with torch.no_grad():
        model = build("mistral")
        model.causal_lm.config.sliding_window = window
        prefix = SharedPrefix(model, embeds(model))  # of 6 positions
        expected = torch.stack([alone(model, row) for row in ROWS])
        torch.testing.assert_close(prefix.log_likelihoods(ROWS), expected, atol=1e-5, rtol=0)


def test_attention_without_mask_is_refused(model):
    model.causal_lm.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"attn_implementation: flash_attention_2 cannot take the mask .*: set it to sdpa"
    ):
        SharedPrefix(model, embeds(model))


def test_common_beginnings_are_computed_once():
    (tree,) = _passes(tuple(ROWS), True, 100)
    assert sorted(tree.tokens.tolist()) == [7, 8, 9, 9, 10, 11, 12, 13, 14, 15]  # last tokens need no state
    for limit in (1, 3, 6):
        parts = _passes(tuple(ROWS), True, limit)
        assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(len(ROWS)))
        assert all(len(part.tokens) <= limit or len(part.rows) == 1 for part in parts)
