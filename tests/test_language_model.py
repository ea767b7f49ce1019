"""Compare splicing, supervised logits, scoring and decoding with slow or independent references."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.model.language_model import VIDEO_TOKEN_ID, LanguageModel, LanguageModelConfig

VOCAB_SIZE, DIM, PAD, EOS = 40, 32, 0, 2
TINY = {
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OVERRIDES = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 8}, "llama": {}}
V = VIDEO_TOKEN_ID


def build(architecture: str = "mistral") -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(architecture, overrides={**TINY, **OVERRIDES[architecture]})
    model = LanguageModel(config, VOCAB_SIZE).eval()
    for parameter in model.parameters():  # as initialised, predictions hardly depend on the context
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build()


def pad(rows: list[list[int]], value: int, side: str) -> Tensor:
    length = max(map(len, rows))
    fill = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)])


def as_batch(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask, and labels that supervise the last two tokens of each row."""
    labels = [[-100] * (len(row) - 2) + row[-2:] for row in rows]
    mask = pad([[1] * len(row) for row in rows], 0, side).bool()
    return pad(rows, PAD, side), mask, pad(labels, -100, side)


def visual_tokens(batch: int, count: int = 3) -> Tensor:
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(1))


ROWS = [[1, V, 5, 6, 7, EOS], [1, 8, 9, V, 10, 11, 12, EOS], [1, PAD, 13, 14], [V, 15, EOS]]


def spliced_row(model: LanguageModel, ids: list[int], visual: Tensor) -> Tensor:
    """Embed one row without padding, piece by piece."""
    pieces = [visual if token == V else model.embed(torch.tensor([token])) for token in ids]
    return torch.cat(pieces)


@pytest.mark.parametrize("side", ["right", "left"])
def test_splice_equals_row_by_row_concatenation(model, side):
    ids, mask, labels = as_batch(ROWS, side)
    visual = visual_tokens(4)
    spliced = model.splice(ids, mask, labels, visual)
    assert spliced.embeds.shape == (4, 8 - 1 + 3, DIM)
    for i, row in enumerate(ROWS):
        kept = spliced.attention_mask[i]
        torch.testing.assert_close(spliced.embeds[i, kept], spliced_row(model, row, visual[i]))
        expected = [-100] * (kept.sum() - 2) + row[-2:]
        assert spliced.labels[i, kept].tolist() == expected
        assert (spliced.labels[i, ~kept] == -100).all()


def test_splice_by_hand(model):
    ids = torch.tensor([[PAD, 1, V, 5], [1, 6, 7, PAD]])
    mask = torch.tensor([[False, True, True, True], [True, True, True, False]])
    labels = torch.tensor([[-100, -100, -100, 5], [-100, 6, 7, -100]])
    spliced = model.splice(ids, mask, labels, visual_tokens(2, 2))
    assert spliced.attention_mask.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert spliced.labels.tolist() == [[-100, -100, -100, -100, 5], [-100, 6, 7, -100, -100]]


def test_splice_without_labels_supervises_nothing(model):
    ids, mask, _ = as_batch(ROWS, "right")
    assert (model.splice(ids, mask, None, visual_tokens(4)).labels == -100).all()


def test_splice_gives_rows_without_video_zero_gradients(model):
    ids, mask, _ = as_batch([[1, V, 5], [1, 6, 7]], "right")
    visual = visual_tokens(2).requires_grad_()
    model.splice(ids, mask, None, visual).embeds.sum().backward()
    assert torch.equal(visual.grad, torch.stack([torch.ones(3, DIM), torch.zeros(3, DIM)]))


def test_splice_rejects_two_videos_and_other_widths(model):
    ids = torch.tensor([[1, V, V, 5]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with pytest.raises(ValueError, match="2 video placeholders in one row"):
        model.splice(ids, mask, None, visual_tokens(1))
    with pytest.raises(ValueError, match=r"got \(1, 3, 31\), expected \(1, at least 1, 32\)"):
        model.splice(ids, mask, None, visual_tokens(1)[..., 1:])


@pytest.mark.parametrize("architecture", list(OVERRIDES))
def test_supervised_logits_equal_a_full_forward_of_each_row(architecture):
    model = build(architecture)
    ids, mask, labels = as_batch(ROWS, "right")
    visual = visual_tokens(4)
    with torch.no_grad():
        logits, targets = model.supervised_logits(model.splice(ids, mask, labels, visual))
        expected = []
        for row, tokens in zip(ROWS, visual, strict=True):
            full = model.causal_lm(inputs_embeds=spliced_row(model, row, tokens)[None]).logits[0]
            expected.append(full[-3:-1])
    assert targets.tolist() == [token for row in ROWS for token in row[-2:]]
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", list(OVERRIDES))
def test_training_passes_no_padding_mask_and_gets_the_same_logits(architecture, monkeypatch):
    """Flash attention takes no mask; with rows padded on the right, causal attention alone gives the same logits."""
    model = build(architecture)
    spliced = model.splice(*as_batch(ROWS, "right"), visual_tokens(4))
    usual, calls = F.scaled_dot_product_attention, []

    def recorded(*args, attn_mask=None, is_causal=False, **kwargs):
        calls.append((attn_mask, is_causal))
        return usual(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    with torch.no_grad():
        logits, _ = model.supervised_logits(spliced)
        assert calls and all(call == (None, True) for call in calls)
        full = model.causal_lm(inputs_embeds=spliced.embeds, attention_mask=spliced.attention_mask).logits
    assert any(mask is not None for mask, _ in calls)  # with the mask, transformers does pass one
    supervised = spliced.labels[:, 1:] != -100
    torch.testing.assert_close(logits, full[:, :-1][supervised], atol=1e-6, rtol=1e-6)


def test_padding_on_the_left_is_refused(model):
    ids, mask, labels = as_batch(ROWS, "left")
    with pytest.raises(ValueError, match="padded on the left"):
        model.supervised_logits(model.splice(ids, mask, labels, visual_tokens(4)))


def test_loss_and_gradient_equal_those_of_transformers(model):
    ids, mask, labels = as_batch(ROWS, "right")
    visual = visual_tokens(4).requires_grad_()
    spliced = model.splice(ids, mask, labels, visual)
    loss = F.cross_entropy(*model.supervised_logits(spliced))
    reference = model.causal_lm(
        inputs_embeds=spliced.embeds, attention_mask=spliced.attention_mask, labels=spliced.labels
    )
    torch.testing.assert_close(loss, reference.loss)
    gradient, expected = (torch.autograd.grad(x, visual, retain_graph=True)[0] for x in (loss, reference.loss))
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_supervised_logits_are_float32_for_a_bfloat16_model():
    model = build().to(torch.bfloat16)
    logits, _ = model.supervised_logits(model.splice(*as_batch(ROWS, "right"), visual_tokens(4)))
    assert logits.dtype == torch.float32


def test_no_supervision_gives_no_logits(model):
    ids, mask, _ = as_batch(ROWS, "right")
    logits, targets = model.supervised_logits(model.splice(ids, mask, None, visual_tokens(4)))
    assert (logits.shape, targets.shape) == ((0, VOCAB_SIZE), (0,))


def test_log_likelihood_equals_row_by_row_sums(model):
    rows = [*ROWS, [1, V, 5, 6]]
    ids, mask, labels = as_batch(rows, "right")
    labels[-1] = -100
    visual = visual_tokens(5)
    expected = []
    with torch.no_grad():
        total, count = model.token_log_likelihood(ids, mask, labels, visual)
        for row, tokens in zip(rows, visual, strict=True):
            log_p = model.causal_lm(inputs_embeds=spliced_row(model, row, tokens)[None]).logits[0].log_softmax(-1)
            expected.append(log_p[-3, row[-2]] + log_p[-2, row[-1]])
    expected[-1] = torch.tensor(0.0)
    torch.testing.assert_close(total, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert count.tolist() == [2, 2, 2, 2, 0]


def greedy(model: LanguageModel, ids: list[int], visual: Tensor, steps: int, eos: int) -> list[int]:
    """Decode one row, with the whole sequence again at every step."""
    embeds, answer = spliced_row(model, ids, visual), []
    for _ in range(steps):
        token = int(model.causal_lm(inputs_embeds=embeds[None]).logits[0, -1].argmax())
        if token == eos:
            break
        answer.append(token)
        embeds = torch.cat([embeds, model.embed(torch.tensor([token]))])
    return answer


@pytest.mark.parametrize("architecture", list(OVERRIDES))
@pytest.mark.parametrize("side", ["right", "left"])
def test_generate_equals_a_greedy_loop(architecture, side):
    model = build(architecture)
    rows = [row[:-1] for row in ROWS]
    ids, mask, _ = as_batch(rows, side)
    visual = visual_tokens(4)
    with torch.no_grad():
        free = [greedy(model, row, tokens, 8, eos=-1) for row, tokens in zip(rows, visual, strict=True)]
        eos = free[0][3]  # a token that does come up, so that rows end at different lengths
        expected = [greedy(model, row, tokens, 8, eos) for row, tokens in zip(rows, visual, strict=True)]
    assert len({len(answer) for answer in expected}) > 1
    assert model.generate(ids, mask, visual, max_new_tokens=8, eos_token_id=eos, pad_token_id=PAD) == expected


def test_generate_ignores_the_sampling_defaults_of_a_saved_model(tmp_path, model):
    ids, mask, _ = as_batch([row[:-1] for row in ROWS], "right")
    arguments = (ids, mask, visual_tokens(4), 8, EOS, PAD)
    saved = build()
    saved.causal_lm.generation_config.repetition_penalty = 5.0
    saved.causal_lm.save_pretrained(tmp_path)
    loaded = LanguageModel(LanguageModelConfig(pretrained=str(tmp_path)), VOCAB_SIZE).eval()
    loaded.load_state_dict(model.state_dict())
    assert loaded.generate(*arguments) == model.generate(*arguments)


def test_pretrained_gives_shape_and_vocabulary(tmp_path, model):
    model.causal_lm.save_pretrained(tmp_path)
    built = LanguageModel(LanguageModelConfig(pretrained=str(tmp_path)), vocab_size=5).state_dict()
    assert {name: value.shape for name, value in built.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_vocabulary_is_that_of_the_tokenizer_unless_given():
    for overrides, expected in (({}, VOCAB_SIZE), ({"vocab_size": 77}, 77)):
        config = LanguageModelConfig("llama", overrides={**TINY, **overrides})
        assert LanguageModel(config, VOCAB_SIZE).causal_lm.config.vocab_size == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of architecture and pretrained"),
        ({"architecture": "llama", "pretrained": "x"}, "exactly one of architecture and pretrained"),
        ({"pretrained": "x", "overrides": {"hidden_size": 8}}, r"overrides \(hidden_size\) go with architecture"),
    ],
)
def test_config_errors_name_the_problem(settings, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**settings)


def test_unknown_override_is_named():
    config = LanguageModelConfig("llama", overrides={**TINY, "hiden_size": 8})
    with pytest.raises(
        ValueError, match=r"overrides: hiden_size unknown to llama \(similar: .*hidden_size\): remove with ~network"
    ):
        LanguageModel(config, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LanguageModelConfig("lama"), r"language_model.architecture: lama is no model type of transformers"),
        (LanguageModelConfig(pretrained="./nowhere"), r"language_model.pretrained: ./nowhere cannot be read"),
    ],
)
def test_unknown_models_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(config, VOCAB_SIZE)


@pytest.mark.parametrize("architecture", list(OVERRIDES))
def test_supervised_logits_equal_logits_at_all_positions_in_loss_and_gradients(architecture):
    model = build(architecture).train()
    ids, mask, labels = as_batch(ROWS, "right")
    visual = visual_tokens(len(ROWS)).requires_grad_()
    logits, targets = model.supervised_logits(model.splice(ids, mask, labels, visual))
    ours = torch.nn.functional.cross_entropy(logits, targets)
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()} | {"visual": visual.grad.clone()}
    model.zero_grad()
    visual.grad = None
    spliced = model.splice(ids, mask, labels, visual)
    plain = model.causal_lm(inputs_embeds=spliced.embeds, attention_mask=spliced.attention_mask, labels=spliced.labels)
    plain.loss.backward()
    torch.testing.assert_close(ours, plain.loss, atol=1e-6, rtol=0)
    for name, p in [*model.named_parameters(), ("visual", visual)]:
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-5)
