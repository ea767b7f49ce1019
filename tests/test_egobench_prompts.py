"""Prompt templates of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.egobench import BENCHMARKS, LoadedBenchmark, load
from datamodules.egobench.config import EgoBenchConfig
from datamodules.egobench.prompts import FILE, STYLES, Prompts
from datamodules.egobench.requests import RequestEncoder
from datamodules.egobench.samples import Clip, Sample
from datamodules.text import PromptConfig, TextEncoder

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples" / "benchmarks"
SAMPLE = Sample("id-7", (Clip("left/7.mp4"),), "Where {options} is the cup?", ("on {question}", "in", "under"), 1)
LOADED = LoadedBenchmark("vlnqa", "choice", Path("videos"), [SAMPLE], [], [], BENCHMARKS["vlnqa"], 1)
TEMPLATES = {
    "prefill": "Best (",
    "choice": {
        "base": "{question}\n{options}",
        "task": "{context}\n\n{question}\n{options}",
        "ego": "My view. {context}\n{question}\n{options}\nGive a letter.",
    },
    "open": {"base": "{question}", "task": "{context}\n{question}", "ego": "My view. {question}\nShort."},
    "context": {"default": "", "egoplan": "Steps."},
}


def template_file(tmp_path, **changes):
    file = tmp_path / "prompts.yaml"
    file.write_text(yaml.safe_dump({**TEMPLATES, **changes}))
    return file


def test_a_template_is_filled_once_and_empty_lines_go(tmp_path):
    file = template_file(tmp_path)
    lettered = "(A) on {question}\n(B) in\n(C) under"
    asked = "Where {options} is the cup?"
    assert Prompts(file, "vlnqa", "task").choice(SAMPLE) == f"{asked}\n{lettered}"
    assert Prompts(file, "egoplan", "task").choice(SAMPLE) == f"Steps.\n{asked}\n{lettered}"
    assert Prompts(str(file), "egoplan").choice(SAMPLE) == f"My view. Steps.\n{asked}\n{lettered}\nGive a letter."
    assert Prompts(file, "egoplan", "base").open(SAMPLE) == asked
    assert Prompts(file, "egoplan").open(SAMPLE) == f"My view. {asked}\nShort."
    assert Prompts(file, "egoplan").prefill == "Best ("


def test_options_are_lettered_in_the_order_that_they_are_shown_in(tmp_path):
    shown = Prompts(template_file(tmp_path), "vlnqa", "base").choice(SAMPLE, (2, 0, 1)).splitlines()
    assert shown[1:] == ["(A) under", "(B) on {question}", "(C) in"]
    for order in ((0, 1), (0, 1, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"id-7: order is .*, expected each of 3 options once"):
            Prompts(template_file(tmp_path), "vlnqa").choice(SAMPLE, order)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill": ""}, "prefill is '', expected a text"),
        ({"prompts": 1}, "keys are choice, context, open, prefill, prompts, expected prefill, choice, open, context"),
        ({"choice": {"base": "x"}}, "choice: expected a text for each of base, task, ego"),
        (
            {"choice": {**TEMPLATES["choice"], "ego": "{context} {question} {answer}"}},
            "choice.ego: slot answer: allowed: context, options, question; choice.ego lacks options in braces",
        ),
        (
            {"open": {**TEMPLATES["open"], "base": "Say it."}},
            "open.base lacks question in braces, and would not ask it",
        ),
        ({"open": {**TEMPLATES["open"], "task": None}}, "open.task lacks question"),
        (
            {"open": {**TEMPLATES["open"], "task": "{question} {options}"}},
            "open.task: slot options: allowed: context, ",
        ),
        ({"context": {"egoplan": "x"}}, "context: default is missing, give it a text, or an empty one"),
        ({"context": {"default": 3}}, "context: expected a text for each name of a benchmark"),
        ({"context": {"default": "{question}"}}, "context: slot question: it may have none"),
    ],
)
def test_invalid_templates_name_the_file_and_the_key(tmp_path, changes, message):
    file = template_file(tmp_path, **changes)
    with pytest.raises(ValueError) as raised:
        Prompts(file, "vlnqa")
    assert str(raised.value).startswith(f"{file}: ")
    assert message in str(raised.value)


def test_files_and_styles_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"^prompts: no file .*nowhere\.yaml: correct the path$"):
        Prompts(tmp_path / "nowhere.yaml", "vlnqa")
    with pytest.raises(ValueError, match=r"^style: got 'own', allowed: base, task, ego$"):
        Prompts(None, "vlnqa", "own")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"x\.yaml: invalid YAML \("):
        Prompts(tmp_path / "x.yaml", "vlnqa")
    (tmp_path / "x.yaml").write_text("- a")
    with pytest.raises(ValueError, match=r"x\.yaml: keys are list, expected prefill"):
        Prompts(tmp_path / "x.yaml", "vlnqa")


def test_our_templates_grow_from_style_to_style_and_are_for_benchmarks_that_exist():
    contexts = yaml.safe_load(FILE.read_bytes())["context"]
    assert contexts.keys() - {"default"} <= BENCHMARKS.keys()
    for name in BENCHMARKS:
        asked = [
            (Prompts(None, name, style).choice(SAMPLE), Prompts(None, name, style).open(SAMPLE)) for style in STYLES
        ]
        for texts in zip(*asked, strict=True):
            assert len(texts[0]) < len(texts[1]) < len(texts[2])
            assert all(SAMPLE.text in text for text in texts)
            assert contexts.get(name, "") in texts[1]
            assert contexts.get(name, "") not in texts[0] or name not in contexts
        assert all("(A) on {question}\n(B) in\n(C) under" in choice for choice, _ in asked)
        assert not any("(B)" in message for _, message in asked)
    assert Prompts(None, "vlnqa").prefill == "Best option: ("


@pytest.mark.parametrize("style", STYLES)
def test_no_question_shows_the_folder_of_its_video_which_is_the_answer(style):
    if not (SAMPLES / "vlnqa").exists():
        pytest.skip(f"needs the official files in {SAMPLES / 'vlnqa'}, which are not part of the repository")
    loaded = load({"name": "vlnqa", "annotations": str(SAMPLES / "vlnqa"), "videos": "videos"})
    prompts = Prompts(None, "vlnqa", style)
    for sample in loaded.samples:
        text = prompts.choice(sample)
        assert sample.text in text
        assert Path(sample.clips[0].video).stem not in text
        assert f"{Path(sample.clips[0].video).parent}/" not in text
        assert "Select the best" not in text  # the instructions of the file that it was taken from
        assert "Only give the best option" not in text


def bytes_tokenizer(folder, merges):
    """Write a tokenizer of single bytes, but for some merges of two."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", *characters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return TextEncoder(str(folder), 400, PromptConfig("plain"))


@pytest.mark.parametrize(
    ("merges", "tokens"),
    [
        ([], ["A", "B", "C"]),
        ([("A", ")")], ["A", "B", "C"]),  # with the bracket, A would be scored as "A)" and the others without it
        ([("A", ")"), ("B", ")"), ("C", ")")], ["A)", "B)", "C)"]),
    ],
)
def test_letters_are_scored_as_tokens_of_one_form(tmp_path, merges, tokens):
    encoder = bytes_tokenizer(tmp_path, merges)
    request = RequestEncoder(LOADED, EgoBenchConfig(), encoder, captions=False).letters(SAMPLE)
    assert [encoder.tokenizer.decode([choice]) for choice in request.choices[0]] == tokens
    assert encoder.tokenizer.decode(request.contexts[0]).endswith("Best option: (")


def test_letters_without_a_common_form_are_refused(tmp_path):
    encoder = bytes_tokenizer(tmp_path, [("(", "A")])
    requests = RequestEncoder(LOADED, EgoBenchConfig(), encoder, captions=False)
    two = Sample("id-7", SAMPLE.clips, SAMPLE.text, SAMPLE.options[:2], 1)
    for sample in (SAMPLE, two):
        with pytest.raises(ValueError, match=r"does not tell letters A to . apart by tokens of one form"):
            requests.letters(sample)
