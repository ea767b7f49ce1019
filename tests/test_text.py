"""Encoded text: the place of the clip, the supervised tokens, and the effect of prompt style and chat template."""

from __future__ import annotations

import socket
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID
from datamodules.io import hub
from datamodules.io.hub import download_command, is_hub_name
from datamodules.text import EncodedText, PromptConfig, TextEncoder, UnusableText, load_tokenizer

QUESTION, ANSWER = "What does the camera-wearer do?", "picks up"
SECOND = ("Which hand does the camera-wearer use?", "left")
THIRD = ("What colour is the ball?", "red")
SYSTEM = "Look at the hands."
STYLES = [
    PromptConfig(),
    PromptConfig("chat", SYSTEM),
    PromptConfig("mistral"),
    PromptConfig("mistral_sys", SYSTEM),
    PromptConfig("plain"),
]

HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|role|>' + message['role'] + '<|text|>\n\n' + message['content'] | trim + '<|over|>' }}{% endfor %}"
)
LETTERS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\nA:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ 'S: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)
THINKING = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|turn|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
    {{- m.content.lstrip('\\n') + '<|end|>\\n' }}
{%- endfor %}"""
"""As Qwen3's: the last answer gets an empty thought, earlier ones do not."""
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""As Mistral's: no place for a system text."""


def save(folder, tokenizer, chat_template, **special):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)


def headers_tokenizer(folder, chat_template=HEADERS, **special):
    """Whole words; role headers as in Llama 3, another end token than the toy one."""
    words = ["<|unknown|>", "<|begin|>", "<|over|>", "<|role|>", "<|text|>", "system", "user", "assistant"]
    texts = (QUESTION, ANSWER, *SECOND, *THIRD, SYSTEM)
    words += sorted({word for text in texts for word in text.replace("?", " ?").replace(".", " .").split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.?]"), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    special = {"bos_token": "<|begin|>", "eos_token": "<|over|>", **special}
    return save(folder, tokenizer, chat_template, additional_special_tokens=["<|role|>", "<|text|>"], **special)


def bytes_tokenizer(folder, chat_template=LETTERS, special=("<end>",), **named):
    """Byte pairs, learnt from text in which the border of an answer is inside a merge (`A: picks` holds `: p`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"A: {ANSWER}", f"A: {SECOND[1]}"] * 8, trainer)
    return save(folder, tokenizer, chat_template, **{"eos_token": special[0], **named})


def mistral_tokenizer(folder, chat_template=STRICT):
    """Bytes with the begin and end tokens of Mistral."""
    return bytes_tokenizer(folder, chat_template, ("</s>", "<s>"), bos_token="<s>")


def thinking_tokenizer(folder):
    """Bytes with two special tokens, and tags of thoughts that are single tokens but not special ones."""
    folder = bytes_tokenizer(folder, THINKING, ("<|end|>", "<|turn|>"), additional_special_tokens=["<|turn|>"])
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    fast.save_pretrained(folder)
    return folder


def pieces_tokenizer(folder):
    """Pieces as of SentencePiece in Llama and Mistral: a space is put in front of every text that is tokenised."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    texts = [f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{QUESTION} [/INST] {ANSWER} ", "\n"] * 4
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False, max_token_length=6)
    )
    return save(folder, tokenizer, None, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def toy(toy_tokenizer):
    return TextEncoder(str(toy_tokenizer), max_text_tokens=64)


@pytest.fixture(params=["toy", "headers", "bytes", "begin", "thinking"])
def tokenizer(request, toy_tokenizer, tmp_path):
    make = {
        "toy": lambda folder: str(toy_tokenizer),
        "headers": headers_tokenizer,
        "bytes": bytes_tokenizer,
        "begin": lambda folder: mistral_tokenizer(folder, LETTERS),
        "thinking": thinking_tokenizer,
    }
    return make[request.param](tmp_path)


@pytest.fixture
def encoder(tokenizer):
    return TextEncoder(tokenizer, max_text_tokens=256)


def words(encoder, ids):
    tokens = encoder.tokenizer.convert_ids_to_tokens([max(i, 0) for i in ids])
    return ["<video>" if i == VIDEO_TOKEN_ID else token for i, token in zip(ids, tokens, strict=True)]


def supervised(encoder, row):
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    return words(encoder, [label for label in row.labels if label != IGNORE_INDEX])


def written(encoder, row):
    """Return the row as text, the supervised part between ⟦ and ⟧; byte tokens make it exact."""
    runs = groupby(zip(row.input_ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    text = ""
    for learned, run in runs:
        shown = ""
        for video, ids in groupby((token for token, _ in run), key=lambda token: token == VIDEO_TOKEN_ID):
            shown += "<video>" if video else encoder.tokenizer.decode(list(ids), skip_special_tokens=False)
        text += f"⟦{shown}⟧" if learned else shown
    return text


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


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (
            PromptConfig("mistral"),
            f"<s>[INST] <video>\n{QUESTION} [/INST]⟦picks up</s>⟧[INST] {SECOND[0]} [/INST]⟦left</s>⟧",
        ),
        (
            PromptConfig("mistral_sys", SYSTEM),
            f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n<video>\n{QUESTION} [/INST]⟦ picks up </s>⟧"
            f"[INST] {SECOND[0]} [/INST]⟦ left </s>⟧",
        ),
        (PromptConfig("plain"), f"<s><video>\n{QUESTION}⟦ picks up</s>⟧{SECOND[0]}⟦ left</s>⟧"),
        (
            PromptConfig("chat"),
            f"<s>[INST] <video>\n{QUESTION} [/INST]⟦picks up</s>⟧[INST] {SECOND[0]} [/INST]⟦left</s>⟧",
        ),
    ],
    ids=lambda value: value.style if isinstance(value, PromptConfig) else "",
)
def test_styles_exactly(prompt, text, tmp_path):
    encoder = TextEncoder(mistral_tokenizer(tmp_path), 512, prompt)
    row = encoder.conversation([(QUESTION, ANSWER), SECOND])
    assert written(encoder, row) == text
    assert row.input_ids.count(encoder.tokenizer.bos_token_id) == 1


def test_styles_without_a_begin_token_start_with_the_text(tmp_path):
    folder = bytes_tokenizer(tmp_path)
    expected = {
        "mistral": f"[INST] <video>\n{QUESTION} [/INST]⟦picks up<end>⟧",
        "plain": f"<video>\n{QUESTION}⟦ picks up<end>⟧",
    }
    for style, text in expected.items():
        encoder = TextEncoder(folder, 512, PromptConfig(style))
        assert written(encoder, encoder.conversation([(QUESTION, ANSWER)])) == text


def test_a_system_text_of_the_chat_style_is_a_system_message(tmp_path):
    encoder = TextEncoder(headers_tokenizer(tmp_path), 64, PromptConfig("chat", SYSTEM))
    row = encoder.conversation([(QUESTION, ANSWER)])
    system = ["<|begin|>", "<|role|>", "system", "<|text|>", "Look", "at", "the", "hands", ".", "<|over|>"]
    asked = ["<|role|>", "user", "<|text|>", "<video>", *"What does the camera-wearer do ?".split(), "<|over|>"]
    assert words(encoder, row.input_ids[: len(system) + len(asked)]) == [*system, *asked]
    assert supervised(encoder, row) == ["picks", "up", "<|over|>"]


def test_headers_and_end_token_come_from_the_template(tmp_path):
    encoder = TextEncoder(headers_tokenizer(tmp_path), max_text_tokens=64)
    row = encoder.conversation([(QUESTION, ANSWER), SECOND])
    head = ["<|role|>", "user", "<|text|>"]
    reply = ["<|role|>", "assistant", "<|text|>"]
    first = ["<|begin|>", *head, "<video>", "What", "does", "the", "camera-wearer", "do", "?", "<|over|>", *reply]
    second = [*head, "Which", "hand", "does", "the", "camera-wearer", "use", "?", "<|over|>", *reply]
    assert words(encoder, row.input_ids) == [*first, "picks", "up", "<|over|>", *second, "left", "<|over|>"]
    assert supervised(encoder, row) == ["picks", "up", "<|over|>", "left", "<|over|>"]


def test_a_template_may_treat_the_last_turn_differently(tmp_path):
    """The empty thought is shown where generation starts, and is not learned; nor is the line break after the end."""
    encoder = TextEncoder(thinking_tokenizer(tmp_path), max_text_tokens=512)
    last = "<|turn|>assistant\n<think>\n\n</think>\n\n"
    one = encoder.conversation([(QUESTION, ANSWER)])
    assert written(encoder, one) == f"<|turn|>user\n<video>\n{QUESTION}<|end|>\n{last}⟦picks up<|end|>⟧"
    assert written(encoder, encoder.conversation([(QUESTION, ANSWER), SECOND, THIRD])) == (
        f"<|turn|>user\n<video>\n{QUESTION}<|end|>\n<|turn|>assistant\n⟦picks up<|end|>⟧\n"
        f"<|turn|>user\n{SECOND[0]}<|end|>\n<|turn|>assistant\n⟦left<|end|>⟧\n"
        f"<|turn|>user\n{THIRD[0]}<|end|>\n{last}⟦red<|end|>⟧"
    )
    assert written(encoder, encoder.prompt(QUESTION)) == f"<|turn|>user\n<video>\n{QUESTION}<|end|>\n{last}"


def test_answers_keep_what_templates_would_rewrite(tmp_path):
    """Templates see a mark in the place of an answer, so a thought written by a person stays where it is."""
    strips = THINKING.replace("m.content.lstrip('\\n')", "m.content.split('</think>')[-1]")
    bytes_tokenizer(tmp_path, strips, ("<|end|>", "<|turn|>"), additional_special_tokens=["<|turn|>"])
    encoder = TextEncoder(str(tmp_path), max_text_tokens=512)
    row = encoder.conversation([(QUESTION, "<think>hm</think>left"), SECOND])
    assert "⟦<think>hm</think>left<|end|>⟧" in written(encoder, row)


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


@pytest.mark.parametrize("prompt", STYLES, ids=lambda prompt: prompt.style + ("+system" if prompt.system else ""))
def test_a_prompt_is_the_conversation_up_to_the_answer(tokenizer, prompt):
    encoder = TextEncoder(tokenizer, 512, prompt)
    for question in (QUESTION, f" {QUESTION}\n", "one\n\ntwo", ""):
        asked = encoder.prompt(question)
        assert asked.labels == [IGNORE_INDEX] * len(asked.input_ids)
        for answer in (ANSWER, "left", "\n left "):
            row = encoder.conversation([(question, answer)])
            assert row.input_ids[: len(asked.input_ids)] == asked.input_ids
            assert row.labels == asked.labels + row.input_ids[len(asked.input_ids) :]


def test_white_space_around_texts_is_dropped(tmp_path):
    encoder = TextEncoder(mistral_tokenizer(tmp_path), 512, PromptConfig("mistral"))
    tidy = encoder.conversation([("one\n\ntwo", "left  hand"), SECOND])
    assert encoder.conversation([(" one\n\ntwo\n", "\tleft  hand \n"), SECOND]) == tidy
    assert "two [/INST]⟦left  hand</s>⟧" in written(encoder, tidy)
    assert encoder.plain(" left ") == encoder.plain("left")
    with_system = [
        TextEncoder(str(tmp_path), 512, PromptConfig("mistral_sys", text)).prompt(QUESTION)
        for text in (SYSTEM, f"{SYSTEM}\n")
    ]
    assert with_system[0] == with_system[1]


def test_the_byte_tokenizer_would_merge_over_the_border_of_an_answer(tmp_path):
    encoder = TextEncoder(bytes_tokenizer(tmp_path), max_text_tokens=64)
    joint = encoder.tokenizer(f"A: {ANSWER}")["input_ids"]
    assert joint != encoder.tokenizer("A:")["input_ids"] + encoder.tokenizer(f" {ANSWER}")["input_ids"]


def test_a_space_before_an_answer_belongs_to_its_first_token(tmp_path):
    encoder = TextEncoder(bytes_tokenizer(tmp_path), max_text_tokens=64)
    row = encoder.conversation([(QUESTION, ANSWER)])
    assert written(encoder, row) == f"Q: <video>\n{QUESTION}\nA:⟦ picks up<end>⟧"


def test_sentencepiece_gives_the_tokens_of_the_whole_text(tmp_path):
    """Its own space in front of the answer is the one that the style writes: not two of them."""
    encoder = TextEncoder(pieces_tokenizer(tmp_path), 512, PromptConfig("mistral_sys", SYSTEM))
    before, after = f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n", f"\n{QUESTION} [/INST] {ANSWER} </s>"
    whole = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
    row = encoder.conversation([(QUESTION, ANSWER)])
    assert row.input_ids == [*whole[0], VIDEO_TOKEN_ID, *whole[1]]
    learned = supervised(encoder, row)
    assert "".join(learned) == "▁picks▁up▁</s>"


def test_plain_is_clip_caption_end(toy):
    row = toy.plain("Camera-wearer taps the red ball with the left hand.")
    caption = ["Camera-wearer", "taps", "the", "red", "ball", "with", "the", "left", "hand", "."]
    assert words(toy, row.input_ids) == ["<s>", "<video>", *caption, "</s>"]
    assert row.labels == [IGNORE_INDEX] * 2 + row.input_ids[2:]


def test_plain_is_the_same_in_every_style_and_as_a_turn_without_a_question(tmp_path):
    folder = mistral_tokenizer(tmp_path)
    for prompt in (PromptConfig("mistral_sys", SYSTEM), PromptConfig("chat"), PromptConfig("plain")):
        encoder = TextEncoder(folder, 64, prompt)
        assert written(encoder, encoder.plain(ANSWER)) == "<s><video>\n⟦picks up</s>⟧"
    assert encoder.conversation([("", ANSWER)]) == encoder.plain(ANSWER)


def test_plain_without_a_begin_token_starts_with_the_clip(tmp_path):
    row = TextEncoder(bytes_tokenizer(tmp_path), max_text_tokens=64).plain(ANSWER)
    assert row.input_ids[0] == VIDEO_TOKEN_ID
    assert row.label_tokens == len(row.input_ids) - 2  # all but the clip and the line break after it


def test_long_rows_are_cut_at_the_end_and_only_text_counts(toy_tokenizer):
    turns = [(QUESTION, ANSWER), SECOND]
    whole = TextEncoder(str(toy_tokenizer), max_text_tokens=23).conversation(turns)
    assert len(whole.input_ids) == 23 + 1
    for length, left in ((22, 4), (21, 3), (12, 3), (10, 1)):
        row = TextEncoder(str(toy_tokenizer), max_text_tokens=length).conversation(turns)
        assert row == EncodedText(whole.input_ids[: length + 1], whole.labels[: length + 1])
        assert row.input_ids[2] == VIDEO_TOKEN_ID
        assert row.label_tokens == left


def test_a_row_without_any_answer_token_is_refused_with_its_counts(toy_tokenizer):
    encoder = TextEncoder(str(toy_tokenizer), max_text_tokens=9)
    message = (
        r"^the first answer begins after 9 of 12 text tokens, beyond max_text_tokens=9: "
        r"raise data\.init_args\.max_text_tokens, or shorten the question$"
    )
    with pytest.raises(UnusableText, match=message):
        encoder.conversation([(QUESTION, ANSWER)])
    assert len(encoder.prompt(QUESTION).input_ids) == 10  # prompts are never cut
    assert encoder.plain("taps " * 20).label_tokens == 8  # after the begin token


def test_a_system_text_beyond_the_limit_is_refused_too(tmp_path):
    encoder = TextEncoder(mistral_tokenizer(tmp_path), 20, PromptConfig("mistral_sys", SYSTEM * 9))
    with pytest.raises(UnusableText, match=r"beyond max_text_tokens=20"):
        encoder.conversation([(QUESTION, ANSWER)])


def test_an_empty_answer_is_refused(toy):
    with pytest.raises(UnusableText, match="the answer of turn 2 is empty"):
        toy.conversation([(QUESTION, ANSWER), (SECOND[0], " \n")])
    with pytest.raises(UnusableText, match="the answer of turn 1 is empty"):
        toy.plain("")


def test_a_limit_below_one_is_refused(toy_tokenizer):
    with pytest.raises(ValueError, match=r"data\.max_text_tokens: got 0, allowed: 1 or more"):
        TextEncoder(str(toy_tokenizer), 0)


@pytest.mark.parametrize("text", ["a<video>b", "</s>", "what is [INST]?", "<unk>", "\ue0000\ue001"])
def test_texts_that_would_inject_tokens_are_refused(toy_tokenizer, toy, text):
    calls = (
        lambda: toy.conversation([(text, ANSWER)]),
        lambda: toy.conversation([(QUESTION, ANSWER), (text, ANSWER)]),
        lambda: toy.conversation([(QUESTION, text)]),
        lambda: toy.plain(text),
        lambda: toy.prompt(text),
        lambda: TextEncoder(str(toy_tokenizer), 64, PromptConfig("chat", text)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"text holds '.*', which stands for the clip or is a special token of"):
            call()


def test_the_refused_token_is_named(toy):
    with pytest.raises(ValueError, match=r"^text holds '\[/INST\]', .*: remove or respell it in 'put \[/INST\] down'$"):
        toy.plain("put [/INST] down")


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


def test_system_texts_are_asked_for_and_refused_by_style():
    with pytest.raises(ValueError, match=r"mistral_sys needs a system text .*: set data\.init_args\.prompt\.system"):
        PromptConfig("mistral_sys")
    for style in ("mistral", "plain"):
        with pytest.raises(ValueError, match=f"style {style} has no place for a system text: remove it"):
            PromptConfig(style, SYSTEM)


ANSWER_LOST = LETTERS.replace("message['content'] + eos_token", "eos_token")
TAG_LOST = LETTERS.replace("'Q: ' + message['content']", "'Q: ' + message['content'].split('\n')[-1]")
TAG_TWICE = LETTERS.replace("'Q: ' + message['content']", "message['content'] + message['content']")
TAG_AGAIN = LETTERS + "{{ messages[0]['content'] }}"
SYSTEM_LOST = LETTERS.replace("'S: ' + message['content']", "''")
NO_END = LETTERS.replace("+ eos_token + '\n'", "+ '\n'")
OTHER_END = LETTERS.replace("eos_token", "'<close>'")


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (
            STRICT,
            SYSTEM,
            r"refuses a conversation \(Roles must alternate\): .* or remove data\.init_args\.prompt\.system",
        ),
        (ANSWER_LOST, None, "leaves out, repeats or reorders answers: fix chat_template, or set"),
        (TAG_LOST, None, "does not show the first question once, .* with its <video>"),
        (TAG_TWICE, None, "does not show the first question once, .* with its <video>"),
        (TAG_AGAIN, None, "does not show the first question once, .* with its <video>"),
        (SYSTEM_LOST, SYSTEM, r"leaves out the system text: .* or remove data\.init_args\.prompt\.system"),
        (NO_END, None, r"puts no end token after an answer, such as <end>, .* or set data\.init_args\.prompt\.style"),
        (
            OTHER_END,
            None,
            "ends answers with <close>, but generation stops at eos_token <end>: .*set eos_token to <close>",
        ),
        (None, None, r"has no chat template: .* or set data\.init_args\.prompt\.style"),
    ],
)
def test_unfit_templates_are_refused_at_the_start_with_the_fix(tmp_path, template, system, message):
    folder = bytes_tokenizer(tmp_path, template, ("<end>", "<close>"), additional_special_tokens=["<close>"])
    with pytest.raises(ValueError, match=rf"^tokenizer: .*{folder}.*{message}") as caught:
        TextEncoder(folder, 64, PromptConfig("chat", system))
    assert "\n" not in str(caught.value)


def test_a_template_that_reorders_answers_is_refused(tmp_path):
    swaps = (
        "{% if messages | length == 4 %}{% set shown = [messages[0], messages[3], messages[2], messages[1]] %}"
        "{% else %}{% set shown = messages %}{% endif %}" + LETTERS.replace("in messages", "in shown")
    )
    encoder = TextEncoder(bytes_tokenizer(tmp_path, swaps), max_text_tokens=64)
    with pytest.raises(ValueError, match="leaves out, repeats or reorders answers"):
        encoder.conversation([(QUESTION, ANSWER), SECOND])


def test_a_template_that_closes_only_the_last_turn_is_refused_for_several(tmp_path):
    closes_last = LETTERS.replace("eos_token", "(eos_token if loop.last else '')")
    encoder = TextEncoder(bytes_tokenizer(tmp_path, closes_last), max_text_tokens=64)
    assert supervised(encoder, encoder.conversation([(QUESTION, ANSWER)]))[-1] == "<end>"
    with pytest.raises(ValueError, match="puts no end token after an answer"):
        encoder.conversation([(QUESTION, ANSWER), SECOND])


def test_a_template_that_prints_the_date_gives_the_same_prompt_every_day(tmp_path):
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n" + LETTERS
    encoder = TextEncoder(bytes_tokenizer(tmp_path, dated), max_text_tokens=64)
    assert written(encoder, encoder.prompt(QUESTION)).startswith("26 Jul 2024\nQ: <video>")


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("Qwen/Qwen3-8B", True),
        ("timm/vit_large_patch14_clip_336.openai", True),
        ("data/toy/tokenizer", False),
        ("weights/Qwen/Qwen3-8B", False),
        ("./Qwen", False),
        ("/Qwen", False),
        ("../Qwen", False),
        ("~/Qwen", False),
        ("Qwen/", False),
        ("Qwen/..", False),
        ("Qwen", False),
        ("", False),
    ],
)
def test_hub_names(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) == hub


def test_a_folder_wins_over_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert not is_hub_name("Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        (
            "weights/DAMO-NLP-SG/VideoLLaMA2-7B-16F",
            ".venv/bin/hf download DAMO-NLP-SG/VideoLLaMA2-7B-16F --local-dir weights/DAMO-NLP-SG/VideoLLaMA2-7B-16F",
        ),
        ("weights/bigscience/bloom", ".venv/bin/hf download bigscience/bloom --local-dir weights/bigscience/bloom"),
        ("/my models/Qwen/Qwen3-8B", ".venv/bin/hf download Qwen/Qwen3-8B --local-dir '/my models/Qwen/Qwen3-8B'"),
        ("data/toy/tokenizer", None),
        ("runs/toy_qwen3/stage1", None),
        ("VideoLLaMA2-7B-16F", None),
        ("weights/my models/Qwen3-8B", None),
    ],
)
def test_the_command_that_downloads_a_folder(folder, command):
    assert download_command(Path(folder)) == command


def test_a_folder_without_a_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^tokenizer: {tmp_path} holds no tokenizer_config\.json: run `make data`"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"^tokenizer: no folder data/toy/tokenizer: run `make data`, or name another"):
        load_tokenizer("data/toy/tokenizer")


def test_a_missing_folder_of_released_weights_names_the_command_to_get_it(tmp_path):
    folder = tmp_path / "weights" / "DAMO-NLP-SG" / "VideoLLaMA2-7B-16F"
    command = f".venv/bin/hf download DAMO-NLP-SG/VideoLLaMA2-7B-16F --local-dir {folder}"
    with pytest.raises(ValueError, match=f"^tokenizer: no folder {folder}: run `{command}`, or name another folder$"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("damage", [None, "tokenizer.json"])
def test_a_local_folder_never_touches_the_network(tmp_path, monkeypatch, damage):
    folder = headers_tokenizer(tmp_path)
    if damage:
        (tmp_path / damage).unlink()

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    if damage is None:
        assert load_tokenizer(folder).eos_token == "<|over|>"
        return
    with pytest.raises(ValueError, match=rf"^tokenizer: {folder} cannot be read \(") as caught:
        load_tokenizer(folder)
    assert "network" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_name_that_cannot_be_fetched_is_named_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        r"^tokenizer: nobody/nothing is no folder and cannot be fetched from the hub \(.*\): correct the name, or run "
        r"`\.venv/bin/hf download nobody/nothing --local-dir weights/nobody/nothing` where there is a network and give "
        r"weights/nobody/nothing instead$"
    )
    with pytest.raises(ValueError, match=message):
        load_tokenizer("nobody/nothing")


def test_a_hub_name_without_a_network_is_refused_within_seconds(monkeypatch):
    """The hub's client alone tries again for most of a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub._is_unreachable.cache_clear()
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"nobody/nothing .* \(http://127.0.0.1:9 cannot be reached, and it is not in"):
        load_tokenizer("nobody/nothing")
    assert time.monotonic() - begun < 20
    hub._is_unreachable.cache_clear()


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    folder = headers_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="has no end token"):
        load_tokenizer(folder)
