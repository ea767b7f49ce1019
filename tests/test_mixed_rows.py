"""Rows beyond videos in the instruction mix: images, text without video, and answers in the first person."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from PIL import Image

from datamodules.batch import VIDEO_TOKEN_ID, ClipBatch
from datamodules.clips.dataset import ClipConfig
from datamodules.clips.sampler import GlobalBatchSampler
from datamodules.egoit.datamodule import InstructionDataModule
from datamodules.egoit.first_person import first_person
from datamodules.egoit.reader import ConversationFile
from datamodules.io.jsonl import InvalidRecords
from datamodules.tools.data_check import read_texts

ASKED = [{"from": "human", "value": "What colour is the box?"}, {"from": "gpt", "value": "red"}]
MORE = [{"from": "human", "value": "What colour is the cup?"}, {"from": "gpt", "value": "blue"}]
IMAGE = {"id": "image", "image": "one.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, ASKED[1]]}
TEXT = {"id": "text", "conversations": ASKED}


@pytest.fixture
def read(toy_tokenizer, tmp_path):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "one.png")

    def read_records(*records, size=16, **options):
        file = tmp_path / "some.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        shared = {"root": str(tmp_path), "tokenizer": str(toy_tokenizer), "clips": ClipConfig(2, size, "squash")}
        return InstructionDataModule([str(file)], **shared, global_batch_size=1, **options).read()

    return read_records


def batch_of(samples):
    (request,) = GlobalBatchSampler(len(samples), len(samples), 1, 0, 1, 0)
    return samples.__getitems__(request)


def test_an_image_fills_all_frames_and_text_has_none(read):
    batch = batch_of(read(IMAGE, TEXT, text_only=True))
    image, text = (batch.ids.index(name) for name in ("image", "text"))
    assert batch.valid.tolist() == [True, True] and not batch.corrupt
    assert batch.ego_video[image].unique(dim=0).shape[0] == 1 and batch.ego_video[image, 0, 8, 8].tolist() == [
        200,
        0,
        0,
    ]
    assert not batch.ego_video[text].any()
    assert (batch.text.input_ids == VIDEO_TOKEN_ID).sum(1)[[image, text]].tolist() == [1, 0]


def test_text_alone_reads_as_a_person_writes_it(read):
    samples = read(TEXT, text_only=True)
    tokenizer = samples.encoder.tokenizer
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What colour is the box?"}, {"role": "assistant", "content": "red"}],
        tokenize=False,
    )
    assert samples.text(0, 0).input_ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    # The limit counts text alone.
    samples.encoder.max_text_tokens = len(samples.text(0, 0).input_ids)
    assert samples.text(0, 0).input_ids[-1] == tokenizer.eos_token_id


def test_a_video_that_is_missing_by_mistake_is_not_taken_for_text(read, tmp_path):
    with pytest.raises(InvalidRecords, match=r"some\.jsonl line 2: field 'video' is missing"):
        read(IMAGE, TEXT)
    tagged = {"id": "b", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, ASKED[1]]}
    with pytest.raises(InvalidRecords, match=r"some\.jsonl line 2: field 'video' is missing"):
        read(TEXT, tagged, text_only=True)
    file = ConversationFile(tmp_path / "some.jsonl", text_only=True)
    assert [record.video for record in file] == [""] and file.changes == {"text without video": 1}
    assert [text.strip() for text in read_texts(tmp_path / "some.jsonl")] == ["What colour is the box?", "red"]


def test_texts_are_not_joined_as_if_they_were_about_one_clip(read):
    samples = read(TEXT, TEXT | {"id": "more", "conversations": MORE}, text_only=True, turns_per_clip=4)
    assert len(samples) == 2 and len(set(samples.groups().tolist())) == 2


@pytest.mark.parametrize(("name", "view"), [("stage0", "exo"), ("stage3", "ego")])
def test_no_loss_of_a_text_depends_on_visual_parameters_whose_gradients_are_zeros(read, toy_tokenizer, name, view):
    batch = batch_of(read(TEXT, text_only=True, view=view, size=tiny.SIZE))
    options = {}
    if name == "stage0":
        options = {"bow_weight": 0.5, "grounding_weight": 0.5, "num_frames": tiny.FRAMES}
    stage = tiny.make_stage(name, toy_tokenizer, network=tiny.network(dropout=0.0), **options)
    stage.configure_model()
    tiny.scatter(stage)
    loss = stage.training_step(batch, 0)
    loss.backward()
    parts = [part for part in stage.model.parts if part not in ("language_model", "lora")]
    visual = [p for part in parts for p in stage.model.part(part).values() if p.requires_grad]
    assert visual and all(p.grad is not None and not p.grad.any() for p in visual)
    of_language = [p.grad for part, _, p in stage.trainable() if part in ("language_model", "lora")]
    assert any(grad is not None and grad.any() for grad in of_language)

    # The same loss as of the language model alone, whatever the visual parameters are.
    language_model, text = stage.model.language_model, batch.text
    logits = language_model.causal_lm(text.input_ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, text.labels[0, 1:], reduction="sum") / batch.label_tokens
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in visual:
            parameter += torch.randn_like(parameter)
    assert torch.equal(stage.training_step(batch, 0), loss)


def test_a_text_changes_nothing_for_the_clip_next_to_it(toy_tokenizer, read):
    """The loss of a batch is that of its rows, each averaged over the tokens of all."""
    stage = tiny.make_stage("stage3", toy_tokenizer, network=tiny.network(dropout=0.0))
    stage.configure_model()
    tiny.scatter(stage)
    both = batch_of(read(IMAGE, TEXT, text_only=True, size=tiny.SIZE))
    total = stage.training_step(both, 0)
    parts = []
    for row in range(2):
        keep = torch.tensor([row])
        text = type(both.text)(both.text.input_ids[keep], both.text.attention_mask[keep], both.text.labels[keep])
        one = ClipBatch([both.ids[row]], text, both.label_tokens, both.ego_video[keep])
        parts.append(stage.training_step(one, 0))
    torch.testing.assert_close(sum(parts), total, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# first person


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("C picks up the cup.", "I pick up the cup."),
        ("#C C squeezes the lemon and mixes it.", "I squeeze the lemon and mix it."),
        ("Camera-wearer taps the red box with the left hand.", "I tap the red box with the left hand."),
        ("With the left hand, Camera-wearer taps the box.", "With the left hand, I tap the box."),
        ("The camera wearer is walking.", "I am walking."),
        ("C doesn't move.", "I don't move."),
        ("C picked up the knife.", "I picked up the knife."),
        (
            "C carefully washes the plates and cups, then dries his hands and puts them on the rack.",
            "I carefully wash the plates and cups, then dry my hands and put them on the rack.",
        ),
        ("C holds knives and forks.", "I hold knives and forks."),
        ("C carries the box. C ties his shoes.", "I carry the box. I tie my shoes."),
        ("C's left hand holds the pan.", "My left hand holds the pan."),
        ("The left hand of C pushes the box.", "My left hand pushes the box."),
        ("C looks at the man and his hand.", "I look at the man and his hand."),
        ("A man talks to C.", "A man talks to me."),
        ("A man watches C.", "A man watches me."),
        # Not about the wearer, or to agree with the options of a choice.
        ("The C cable is on the desk.", "The C cable is on the desk."),
        ("cut tomato", "cut tomato"),
        ("The man picks up his cup.", "The man picks up his cup."),
        ("(B) C picks up the cup", "(B) C picks up the cup"),
        ("C", "C"),
    ],
)
def test_answers_in_the_first_person(written, expected):
    assert first_person(written) == expected


def test_the_first_person_is_an_option(read):
    given = {**IMAGE, "conversations": [IMAGE["conversations"][0], {"from": "gpt", "value": "C taps the box."}]}
    prompt = {"task": "description", "query": "", "options": [], "target": "Camera-wearer taps the box."}
    rendered = {"id": "b", "image": "one.png", "prompt": prompt}
    assert [read(given, rendered).turns(n, 0)[0][1] for n in (0, 1)] == ["C taps the box.", prompt["target"]]
    samples = read(given, rendered, answer_person="first")
    assert [samples.turns(n, 0)[0][1] for n in (0, 1)] == ["I tap the box.", "I tap the box."]
    assert samples.turns(0, 0)[0][0] == read(given).turns(0, 0)[0][0]
    with pytest.raises(ValueError, match=r"data\.answer_person: got 'third', allowed: raw, first"):
        read(given, answer_person="third")
