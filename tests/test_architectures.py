"""Compare every supported architecture, with its default quirks, with transformers: logits, weights, generation."""

import pytest
import tiny
import torch
from test_language_model import DIM, EOS, PAD, ROWS, VOCAB_SIZE, as_batch, greedy, spliced_row, visual_tokens
from test_plan import config as plan_config
from torch import Tensor

from lightning_modules.model.language_model import ARCHITECTURES, LanguageModel, LanguageModelConfig
from lightning_modules.model.language_model import VIDEO_TOKEN_ID as V
from lightning_modules.model.prefix_cache import SharedPrefix
from lightning_modules.plan.stages import plan_stage

TINY = {
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA = {**TINY, "head_dim": 8}
OVERRIDES = {
    "cohere": {**TINY, "logit_scale": 0.25},
    "gemma": GEMMA,
    # Small caps, so that they matter for small logits, and windows that the texts reach.
    "gemma2": {**GEMMA, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "sliding_window": 5},
    "gemma3_text": {
        **GEMMA,
        "final_logit_softcapping": 2.0,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_embd": DIM, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "granite": {**TINY, "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "llama": TINY,
    "mistral": {**TINY, "sliding_window": 5},
    "olmo2": TINY,
    "opt": {
        "hidden_size": DIM,
        "word_embed_proj_dim": DIM,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "phi3": {**TINY, "sliding_window": 5},
    "qwen2": {**TINY, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**TINY, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "smollm3": {**TINY, "no_rope_layer_interval": 2},
}
CONTINUATIONS = [(7, 8, EOS), (7, 8, 9, EOS), (10, EOS), (EOS,), (11, 12, 13, 14, 15, EOS), (7, 9, EOS)]


def build(architecture: str, **overrides: object) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(architecture, overrides={**OVERRIDES[architecture], **overrides})
    model = LanguageModel(config, VOCAB_SIZE).eval()
    for name, parameter in model.named_parameters():  # as initialised, predictions hardly depend on the context
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05 if "embed" in name or "wte" in name else 0.3)
    return model


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    with torch.no_grad():
        yield build(request.param)


def own_logits(model: LanguageModel, ids: list[int], visual: Tensor) -> Tensor:
    """Return the logits that transformers computes for one row, float [S, V]."""
    logits: Tensor = model.causal_lm(inputs_embeds=spliced_row(model, ids, visual)[None]).logits[0]
    return logits


def test_every_architecture_is_tested():
    assert set(OVERRIDES) == set(ARCHITECTURES)


def test_logits_are_those_of_transformers(model):
    ids, mask, labels = as_batch(ROWS, "right")
    visual = visual_tokens(4)
    logits, _ = model.supervised_logits(model.splice(ids, mask, labels, visual))
    expected = torch.cat([own_logits(model, row, tokens)[-3:-1] for row, tokens in zip(ROWS, visual, strict=True)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_embeddings_are_those_that_transformers_makes_of_tokens(model):
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, EOS]])
    expected = model.causal_lm(input_ids=ids).logits
    hidden = model.causal_lm.get_decoder()(inputs_embeds=model.embed(ids)).last_hidden_state
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-5, rtol=1e-5)


def test_weights_written_by_transformers_give_the_same_logits(model, toy_tokenizer, tmp_path):
    model.causal_lm.save_pretrained(tmp_path)
    network = tiny.network()
    network.language_model = LanguageModelConfig(pretrained=str(tmp_path))
    stage = tiny.make_stage("stage1", toy_tokenizer, network=network)
    stage.configure_model()
    stage.eval()
    assert stage.model.project_exo(stage.model.exo_encoder(tiny.video(1, seed=0))).shape[-1] == DIM
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, EOS]])
    read = stage.model.language_model
    assert torch.equal(read.causal_lm(input_ids=ids).logits, model.causal_lm(input_ids=ids).logits)
    assert [type(block) for block in read.blocks()] == [type(block) for block in model.blocks()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stages_train_and_are_planned(architecture, toy_tokenizer):
    network = tiny.network()
    overrides = {**OVERRIDES[architecture], "vocab_size": 1200}
    network.language_model = LanguageModelConfig(architecture, overrides=overrides)
    losses = []
    for recompute in (False, True):
        stage = tiny.make_stage("stage1", toy_tokenizer, network=network, activation_checkpointing=recompute)
        stage.configure_model()
        stage.losses(tiny.clip_batch())["vtg"].backward()
        losses.append(next(p.grad for name, p in stage.model.part("projector").items() if name.endswith("weight")))
    torch.testing.assert_close(*losses)
    assert losses[0].abs().max() > 0
    planned = plan_stage(plan_config("stage1"), tiny.make_stage("stage1", toy_tokenizer, network=network))
    assert planned.flops > 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_generation_is_a_greedy_loop(model, side):
    rows = [row[:-1] for row in ROWS]
    ids, mask, _ = as_batch(rows, side)
    visual = visual_tokens(4)
    expected = [greedy(model, row, tokens, 8, EOS) for row, tokens in zip(rows, visual, strict=True)]
    assert model.generate(ids, mask, visual, max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD) == expected


def embeds(model: LanguageModel, ids: list[int]) -> Tensor:
    return spliced_row(model, ids, visual_tokens(1)[0])


def alone(model: LanguageModel, prompt: list[int], row: tuple[int, ...]) -> Tensor:
    """Return log p of a row after a prompt by a forward pass of its own, without any cache."""
    log_p = own_logits(model, [*prompt, *row], visual_tokens(1)[0]).log_softmax(-1)
    return log_p[-len(row) - 1 : -1].gather(1, torch.tensor(row)[:, None]).sum()


def check_prefix(model: LanguageModel, prompt: list[int]) -> None:
    prefix = SharedPrefix(model, embeds(model, prompt))
    expected = torch.stack([alone(model, prompt, row) for row in CONTINUATIONS])
    for _ in range(2):
        torch.testing.assert_close(prefix.log_likelihoods(CONTINUATIONS), expected, atol=2e-5, rtol=1e-5)
    for row, logits in zip(CONTINUATIONS, prefix.next_logits(CONTINUATIONS), strict=True):
        full = own_logits(model, [*prompt, *row], visual_tokens(1)[0])[-1]
        torch.testing.assert_close(logits, full, atol=1e-5, rtol=1e-5)
    with prefix.extended([3, 4]):
        longer = torch.stack([alone(model, [*prompt, 3, 4], row) for row in CONTINUATIONS])
        torch.testing.assert_close(prefix.log_likelihoods(CONTINUATIONS), longer, atol=2e-5, rtol=1e-5)
    assert prefix.greedy(6, end=-1) == greedy(model, prompt, visual_tokens(1)[0], 6, eos=-1)
    torch.testing.assert_close(prefix.log_likelihoods(CONTINUATIONS), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt", [[1, V], [1, V, 5, 6, 7, 8, 9]], ids=["window ahead", "window behind"])
def test_scores_after_a_shared_prefix_are_those_of_rows_alone(model, prompt):
    check_prefix(model, prompt)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
@torch.no_grad()
def test_attention_is_a_key(architecture, attention):
    overrides = OVERRIDES[architecture]
    config = LanguageModelConfig(architecture, overrides=overrides, attn_implementation=attention)
    model = LanguageModel(config, VOCAB_SIZE).eval()
    assert model.causal_lm.config._attn_implementation == attention
    model.load_state_dict(build(architecture).state_dict())
    check_prefix(model, [1, V, 5, 6])


def test_attention_that_is_not_possible_names_its_key():
    for attention in ("nonsense", "flash_attention_2"):
        config = LanguageModelConfig("llama", overrides=TINY, attn_implementation=attention)
        with pytest.raises(ValueError, match=rf"network.language_model.attn_implementation: {attention} is not possib"):
            LanguageModel(config, VOCAB_SIZE)


def test_other_architectures_are_refused_by_name(tmp_path):
    message = (
        r"network.language_model.architecture: falcon_h1: model type falcon_h1 is not supported.*: use one of cohe"
    )
    with pytest.raises(ValueError, match=message):
        LanguageModel(LanguageModelConfig("falcon_h1"), VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"architecture: gemma3: .*is not supported.* gemma3_text"):
        LanguageModel(LanguageModelConfig("gemma3"), VOCAB_SIZE)
    (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    with pytest.raises(ValueError, match=r"language_model.pretrained: .*: model type gptj is not supported"):
        LanguageModel(LanguageModelConfig(pretrained=str(tmp_path)), VOCAB_SIZE)


@torch.no_grad()
def test_opt_with_narrower_embeddings():
    model = build("opt", word_embed_proj_dim=16)
    assert model.dim == 16
    ids, mask, labels = as_batch(ROWS, "right")
    visual = visual_tokens(4)[..., :16]
    logits, _ = model.supervised_logits(model.splice(ids, mask, labels, visual))
    expected = torch.cat([own_logits(model, row, tokens)[-3:-1] for row, tokens in zip(ROWS, visual, strict=True)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@torch.no_grad()
def test_more_positions_than_are_learned_are_refused(architecture):
    model = build(architecture)
    with pytest.raises(
        ValueError, match=rf"65 positions, but {architecture} has embeddings for 64: lower clips.num_fra"
    ):
        SharedPrefix(model, torch.zeros(65, DIM))
    prefix = SharedPrefix(model, torch.zeros(62, DIM))
    prefix.log_likelihoods([(5, 6, 7)])
    with pytest.raises(ValueError, match=rf"65 positions, but {architecture} has embeddings for 64"):
        prefix.log_likelihoods([(5, 6, 7, 8)])


def with_rope(rope: dict[str, object], **limits: int) -> LanguageModel:
    return build("phi3", sliding_window=None, rope_parameters={"rope_theta": 10000.0, **rope}, **limits)


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 9,
}


@torch.no_grad()
def test_longrope_is_exact_on_either_side_of_its_switch_and_refused_across_it():
    model = with_rope(LONG, max_position_embeddings=64, original_max_position_embeddings=9)
    check_prefix(model, [1, V, 5, 6, 7, 8, 9, 10])  # 10 positions
    prefix = SharedPrefix(model, embeds(model, [1, V, 5]))  # 5 positions
    expected = torch.stack([alone(model, [1, V, 5], row) for row in CONTINUATIONS[:4]])
    torch.testing.assert_close(prefix.log_likelihoods(CONTINUATIONS[:4]), expected, atol=2e-5, rtol=1e-5)
    message = r"network.language_model: 10 positions, but rope type longrope changes beyond 9, after keys of 5 were"
    with pytest.raises(ValueError, match=message):
        prefix.log_likelihoods([(11, 12, 13, 14, 15, EOS)])
    ids, mask, _ = as_batch([[1, V, 5]], "right")
    with pytest.raises(ValueError, match="rope type longrope changes beyond 9"):
        model.generate(ids, mask, visual_tokens(1), max_new_tokens=6, eos_token_id=EOS, pad_token_id=PAD)


@torch.no_grad()
def test_dynamic_rope_is_refused_beyond_its_length():
    rope = {"rope_type": "dynamic", "factor": 2.0}
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **rope}, max_position_embeddings=9)
    prefix = SharedPrefix(model, embeds(model, [1, V, 5]))
    expected = torch.stack([alone(model, [1, V, 5], row) for row in CONTINUATIONS[:4]])
    torch.testing.assert_close(prefix.log_likelihoods(CONTINUATIONS[:4]), expected, atol=2e-5, rtol=1e-5)
    message = r"10 positions, but rope type dynamic changes with the length beyond 9: lower clips.num_frames"
    with pytest.raises(ValueError, match=message):
        prefix.log_likelihoods([(11, 12, 13, 14, 15, EOS)])
    with pytest.raises(ValueError, match=message):
        model.supervised_logits(model.splice(*as_batch([[1, V, 5, 6, 7, 8, 9, EOS]], "right"), visual_tokens(1)))


@torch.no_grad()
def test_all_scores_are_of_the_same_head_in_float32(model):
    prompt = [1, V, 5, 6]
    with torch.autocast("cpu", torch.bfloat16):
        prefix = SharedPrefix(model, embeds(model, prompt))
        letters = prefix.next_logits([()])[0]
        scores = prefix.log_likelihoods([(token,) for token in range(VOCAB_SIZE)])
        full = model.causal_lm(inputs_embeds=embeds(model, prompt)[None]).logits[0, -1]
    assert (letters.dtype, full.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(scores, letters.log_softmax(-1), atol=1e-5, rtol=0)
    assert (letters != letters.bfloat16()).float().mean() > 0.9
    assert (full != full.bfloat16()).float().mean() > 0.9


def test_the_float32_head_of_bfloat16_weights_has_gradients():
    model = build("llama").to(torch.bfloat16)
    head = model.causal_lm.get_output_embeddings()
    hidden = torch.randn(3, 2, DIM, dtype=torch.bfloat16, requires_grad=True)
    weigh = torch.randn(3, 2, VOCAB_SIZE)
    ours = torch.autograd.grad((model.logits(hidden) * weigh).sum(), [hidden, head.weight])
    expected = torch.autograd.grad(
        (torch.nn.functional.linear(hidden.float(), head.weight.float()) * weigh).sum(), [hidden, head.weight]
    )
    for gradient, other in zip(ours, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, other)
