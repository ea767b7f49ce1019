"""Where the clip stands in a row of text, which tokens are supervised, and what the chat template decides."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID
from datamodules.text import EncodedText, TextEncoder, load_tokenizer

QUESTION, ANSWER = "What does the camera-wearer do?", "picks up"
SECOND = ("Which hand does the camera-wearer use?", "left")

HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|role|>' + message['role'] + '<|text|>\n\n' + message['content'] + '<|over|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|role|>assistant<|text|>\n\n' }}{% endif %}"
)
PLAIN_LETTERS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\nA:' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
)


def save(folder, tokenizer, chat_template, **special):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)


def headers_tokenizer(folder, chat_template=HEADERS, **special):
    """Whole words; role headers as in Llama 3, another end token than the toy one."""
    words = ["<|unknown|>", "<|begin|>", "<|over|>", "<|role|>", "<|text|>", "user", "assistant"]
    words += sorted({word for text in (QUESTION, ANSWER, *SECOND) for word in text.replace("?", " ?").split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\?"), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    special = {"bos_token": "<|begin|>", "eos_token": "<|over|>", **special}
    return save(folder, tokenizer, chat_template, additional_special_tokens=["<|role|>", "<|text|>"], **special)


def bytes_tokenizer(folder):
    """Byte pairs, learnt from text in which the border of an answer is inside a merge (`A: picks` holds `: p`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"A: {ANSWER}", f"A: {SECOND[1]}"] * 8, trainer)
    return save(folder, tokenizer, PLAIN_LETTERS, eos_token="<end>")


@pytest.fixture
def toy(toy_tokenizer):
    return TextEncoder(str(toy_tokenizer), max_text_tokens=64)


@pytest.fixture(params=["toy", "headers", "bytes"])
def encoder(request, toy_tokenizer, tmp_path):
    make = {"toy": lambda folder: str(toy_tokenizer), "headers": headers_tokenizer, "bytes": bytes_tokenizer}
    return TextEncoder(make[request.param](tmp_path), max_text_tokens=256)


def words(encoder, ids):
    tokens = encoder.tokenizer.convert_ids_to_tokens([max(i, 0) for i in ids])
    return ["<video>" if i == VIDEO_TOKEN_ID else token for i, token in zip(ids, tokens, strict=True)]


def supervised(encoder, row):
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    return words(encoder, [label for label in row.labels if label != IGNORE_INDEX])


def test_one_turn_token_by_token(toy):
    row = toy.conversation([(QUESTION, ANSWER)])
    asked = ["<s>", "[INST]", "<video>", "What", "does", "the", "camera-wearer", "do", "?", "[/INST]"]
    assert words(toy, row.input_ids) == [*asked, "picks", "up", "</s>"]
    assert row.labels == [IGNORE_INDEX] * 10 + row.input_ids[10:]
    assert row.label_tokens == 3


def test_every_answer_of_a_conversation_is_supervised_with_its_end_token(toy):
    row = toy.conversation([(QUESTION, ANSWER), SECOND])
    first = ["<s>", "[INST]", "<video>", "What", "does", "the", "camera-wearer", "do", "?", "[/INST]"]
    second = ["[INST]", "Which", "hand", "does", "the", "camera-wearer", "use", "?", "[/INST]"]
    assert words(toy, row.input_ids) == [*first, "picks", "up", "</s>", *second, "left", "</s>"]
    assert [label != IGNORE_INDEX for label in row.labels] == [False] * 10 + [True] * 3 + [False] * 9 + [True] * 2
    assert row.label_tokens == 5


def test_headers_and_end_token_come_from_the_template(tmp_path):
    encoder = TextEncoder(headers_tokenizer(tmp_path), max_text_tokens=64)
    row = encoder.conversation([(QUESTION, ANSWER), SECOND])
    head = ["<|role|>", "user", "<|text|>"]
    reply = ["<|role|>", "assistant", "<|text|>"]
    first = ["<|begin|>", *head, "<video>", "What", "does", "the", "camera-wearer", "do", "?", "<|over|>", *reply]
    second = [*head, "Which", "hand", "does", "the", "camera-wearer", "use", "?", "<|over|>", *reply]
    assert words(encoder, row.input_ids) == [*first, "picks", "up", "<|over|>", *second, "left", "<|over|>"]
    assert supervised(encoder, row) == ["picks", "up", "<|over|>", "left", "<|over|>"]


def test_the_answer_is_supervised_whatever_the_tokenizer(encoder):
    row = encoder.conversation([(QUESTION, ANSWER)])
    ids = [label for label in row.labels if label != IGNORE_INDEX]
    text = encoder.tokenizer.decode(ids, skip_special_tokens=False).strip()
    assert text.replace(" ", "") == f"picksup{encoder.tokenizer.eos_token}"


def test_the_clip_stands_once_and_before_the_question(encoder):
    rows = [encoder.conversation([(QUESTION, ANSWER), SECOND]), encoder.plain(ANSWER), encoder.prompt(QUESTION)]
    for row in rows:
        assert row.input_ids.count(VIDEO_TOKEN_ID) == 1
    for row in (rows[0], rows[2]):
        after = row.input_ids[row.input_ids.index(VIDEO_TOKEN_ID) + 1 :]
        assert encoder.tokenizer.decode(after).strip().startswith("What does the camera-wearer do")


def test_a_prompt_is_the_conversation_up_to_the_answer(encoder):
    prompt = encoder.prompt(QUESTION)
    for turns in ([(QUESTION, ANSWER)], [(QUESTION, "left")], [(QUESTION, ANSWER), SECOND]):
        row = encoder.conversation(turns)
        start = next(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX)
        assert prompt.input_ids == row.input_ids[:start]
    assert prompt.labels == [IGNORE_INDEX] * len(prompt.input_ids)
    assert prompt.label_tokens == 0


def test_the_byte_tokenizer_would_merge_over_the_border_of_an_answer(tmp_path):
    encoder = TextEncoder(bytes_tokenizer(tmp_path), max_text_tokens=64)
    joint = encoder.tokenizer(f"A: {ANSWER}")["input_ids"]
    assert joint != encoder.tokenizer("A:")["input_ids"] + encoder.tokenizer(f" {ANSWER}")["input_ids"]


def test_plain_is_clip_caption_end(toy):
    row = toy.plain("Camera-wearer taps the red ball with the left hand.")
    caption = ["Camera-wearer", "taps", "the", "red", "ball", "with", "the", "left", "hand", "."]
    assert words(toy, row.input_ids) == ["<s>", "<video>", *caption, "</s>"]
    assert row.labels == [IGNORE_INDEX] * 2 + row.input_ids[2:]


def test_plain_without_a_begin_token_starts_with_the_clip(tmp_path):
    row = TextEncoder(bytes_tokenizer(tmp_path), max_text_tokens=64).plain(ANSWER)
    assert row.input_ids[0] == VIDEO_TOKEN_ID
    assert row.label_tokens == len(row.input_ids) - 2  # all but the clip and the line break after it


def test_long_rows_are_cut_at_the_end(toy_tokenizer):
    turns = [(QUESTION, ANSWER), SECOND]
    whole = TextEncoder(str(toy_tokenizer), max_text_tokens=24).conversation(turns)
    assert len(whole.input_ids) == 24
    for length, left in ((23, 4), (22, 3), (13, 3), (11, 1)):
        row = TextEncoder(str(toy_tokenizer), max_text_tokens=length).conversation(turns)
        assert row == EncodedText(whole.input_ids[:length], whole.labels[:length])
        assert row.label_tokens == left


def test_a_row_without_any_answer_token_is_refused(toy_tokenizer):
    encoder = TextEncoder(str(toy_tokenizer), max_text_tokens=10)
    with pytest.raises(ValueError, match=r"max_text_tokens=10 of 13 tokens: raise data\.init_args\.max_text_tokens"):
        encoder.conversation([(QUESTION, ANSWER)])


def test_batch_pads_on_the_right():
    rows = [EncodedText([1, VIDEO_TOKEN_ID, 7], [IGNORE_INDEX, IGNORE_INDEX, 7]), EncodedText([5], [5])]
    batch = TextEncoder.batch(rows)
    assert batch.input_ids.tolist() == [[1, VIDEO_TOKEN_ID, 7], [5, 0, 0]]
    assert batch.attention_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.labels.tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 7], [5, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool


def test_a_batch_of_no_rows_is_empty():
    assert TextEncoder.batch([]).input_ids.shape == (0, 0)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"^tokenizer: {tmp_path} holds no tokenizer_config\.json: run `make data`"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="nowhere holds no tokenizer_config"):
        load_tokenizer("nowhere")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    folder = headers_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="has no end token"):
        load_tokenizer(folder)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    folder = headers_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        TextEncoder(folder, max_text_tokens=64)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    """As templates do that close the last turn only: what was shown before is not the start of what is shown now."""
    closes_last = PLAIN_LETTERS + "{% if messages[-1]['role'] == 'assistant' %}{{ '<|over|>' }}{% endif %}"
    encoder = TextEncoder(headers_tokenizer(tmp_path, chat_template=closes_last), max_text_tokens=64)
    assert encoder.conversation([(QUESTION, ANSWER)]).label_tokens > 0
    with pytest.raises(ValueError, match="chat template"):
        encoder.conversation([(QUESTION, ANSWER), SECOND])
