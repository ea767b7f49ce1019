"""Make questions, answers and answer options from a take's ground truth, and the tokenizer of their words."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.ego_exo_clip.sources.ego_exo4d import camera_wearer_text
from datamodules.toy_world.scene import (
    COLOURS,
    HANDS,
    KINDS,
    PHRASINGS,
    PRESETS,
    VERBS,
    Action,
    Take,
    Thing,
    World,
    sentence,
)

CAPTION_INSTRUCTION = "Describe the video."
QUESTIONS = {
    "verb": "What does the camera-wearer do?",
    "object": "Which object does the camera-wearer use?",
    "colour": "What colour is the object?",
    "hand": "Which hand does the camera-wearer use?",
    "check": "Does the camera-wearer use the {thing}?",
}
PHRASED_QUESTIONS = {
    "verb": (
        QUESTIONS["verb"],
        "Look at the hands of the camera-wearer and at the object between them. Which action is shown in this clip?",
        "In a few words, what is happening to the object that the camera-wearer touches?",
    ),
    "object": (
        QUESTIONS["object"],
        "Several objects are on the table. Which of them does the camera-wearer handle in this clip?",
        "Name the object that the camera-wearer moves or touches.",
    ),
    "colour": (
        QUESTIONS["colour"],
        "Several objects are on the table. What is the colour of the one that the camera-wearer handles?",
        "Name the colour of the object that the camera-wearer moves or touches.",
    ),
    "hand": (
        QUESTIONS["hand"],
        "From the point of view of the camera-wearer, which of the two hands acts on the object?",
        "Is it the left or the right hand that the camera-wearer uses?",
    ),
    "check": (
        QUESTIONS["check"],
        "Several objects are on the table. Is the {thing} the one that the camera-wearer handles?",
        "Yes or no: does the camera-wearer touch the {thing} in this clip?",
    ),
}
"""Questions by kind in a world with phrasings; the first are those of the other worlds."""
YES_NO_QUESTIONS = {
    "verb": "Is it true that the camera-wearer {} an object?",
    "object": "Is the object that the camera-wearer uses a {}?",
    "colour": "Is the object that the camera-wearer uses {}?",
    "hand": "Does the camera-wearer use the {} hand?",
    "check": QUESTIONS["check"].format(thing="{}"),
}
"""Questions about one attribute each and one about colour and kind, in a world with phrasings."""
ACTION_QUESTION = "What does the camera-wearer do with the object?"
_FRAMES = (
    "{}",
    "What? {}",
    "video. {}",
    "use the video. {}",
    "with the video. {}",
    "What is the video? {}",
    "{} use the video.",
    "{} with the video.",
    "{} yes?",
    "{} the video. yes?",
)
_TEMPLATES = {
    "qa": ("phrase", "{question}", "use the object. the colour. the hand. yes. no."),
    "description": ("sentence", CAPTION_INSTRUCTION, "use the object with the colour with the hand."),
    "action": ("phrase", ACTION_QUESTION, "use the colour with the object."),
    "mcq": ("letter", "{question}\nOptions:\n{options}", "use the option with the object."),
}
"""The form of the answers, the question, and the text that the style ``task`` adds, by task."""
_EGO = "the video is with the camera-wearer."
BENCHMARK_PROMPTS = {
    "prefill": "(",
    "choice": {
        "base": "{question}\nOptions:\n{options}",
        "task": "use the video. {question}\nOptions:\n{options}",
        "ego": f"{_EGO} use the video. {{question}}\nOptions:\n{{options}}",
    },
    "open": {
        "base": "{question}",
        "task": "use the video. {question}",
        "ego": f"{_EGO} use the video. {{question}}",
    },
    "context": {"default": ""},
}
"""Prompts of the benchmarks, for choices and open answers in three styles, and the prefix of the answer to a choice."""
_PUNCTUATION = r"[.,?:()]"
_MARKS = re.compile(rf"{_PUNCTUATION}|[^\s.,?:()]+")  # words and marks
_MORE_TEXTS = (  # further words of prompts and answers
    "(A B C D E): Options option Best answer is In",
    "both neither maybe partly",
    "first, last, then and next before after that uses is",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST] ' }}"
    "{% else %}{{ message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def caption(take: Take, action: Action) -> str:
    """Return the training text of an action's narration."""
    return full_caption(action.verb, take.things[action.thing], action.hand)


def parts(take: Take, action: Action) -> dict[str, str]:
    """Return the ground truth of one action by attribute."""
    thing = take.things[action.thing]
    return {"verb": action.verb, "object": thing.kind, "colour": thing.colour, "hand": action.hand}


def answers(take: Take, action: Action, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return a (kind, question, answer) for each entry of ``QUESTIONS``; yes and no are equally likely."""
    truth = parts(take, action)
    used = take.things[action.thing]
    yes = bool(rng.random() < 0.5)
    asked = used if yes else _other_thing(take, used, rng)
    texts = QUESTIONS
    if take.world.phrasings:
        texts = {kind: phrasings[int(rng.integers(len(phrasings)))] for kind, phrasings in PHRASED_QUESTIONS.items()}
    rows = [(kind, texts[kind], truth[kind]) for kind in ("verb", "object", "colour", "hand")]
    return [*rows, ("check", texts["check"].format(thing=asked.phrase), "yes" if yes else "no")]


def comparisons(take: Take, action: Action, rng: np.random.Generator) -> list[tuple[str, str, list[str]]]:
    """Return a (question, answer, options) for everything that is asked by comparing texts with a clip.

    Two yes-no questions for each entry of ``YES_NO_QUESTIONS``, without options and with yes and no equally likely;
    then a question about each attribute with two to four options.
    """
    truth, known, used = parts(take, action), vocabulary(take.world), take.things[action.thing]
    right = {**truth, "check": used.phrase}
    rows: list[tuple[str, str, list[str]]] = []
    for kind, question in 2 * list(YES_NO_QUESTIONS.items()):
        if yes := bool(rng.random() < 0.5):
            asked = right[kind]
        elif kind == "check":
            asked = _other_thing(take, used, rng).phrase
        else:
            asked = str(rng.choice([text for text in known[kind] if text != truth[kind]]))
        rows.append((question.format(asked), "yes" if yes else "no", []))
    for kind, answer in truth.items():
        wrong = [text for text in known[kind] if text != answer]
        options = [answer, *rng.permutation(wrong)[: rng.integers(1, 4)].tolist()]
        phrasings = PHRASED_QUESTIONS[kind]
        rows.append((phrasings[int(rng.integers(len(phrasings)))], answer, rng.permutation(options).tolist()))
    return rows


def phrase(verb: str, thing: Thing, hand: str) -> str:
    """Return verb and object, without the wearer and the hand."""
    return f"{verb} the {thing.phrase}"


def vocabulary(world: World) -> dict[str, list[str]]:
    """Return the possible answers to each kind of question in a world."""
    kinds, colours = list(KINDS[: world.kinds]), list(COLOURS)[: world.colours]
    return {"verb": list(VERBS), "object": kinds, "colour": colours, "hand": list(HANDS), "check": ["yes", "no"]}


def full_caption(verb: str, thing: Thing, hand: str) -> str:
    """Return the training text of a narration, by the rule that also rewrites a real release's narrations."""
    text = camera_wearer_text(sentence(verb, thing, hand))
    assert text is not None
    return text


def options(
    take: Take, action: Action, rng: np.random.Generator, render: Callable[[str, Thing, str], str] = full_caption
) -> tuple[list[str], int]:
    """Return four texts in random order, and the index of the true one.

    The wrong texts have another verb, another object, or both.

    Args:
        take, action: the ground truth.
        rng: draws the wrong texts and the order.
        render: makes a text from verb, object and hand.
    """
    used = take.things[action.thing]
    verb = str(rng.choice([v for v in VERBS if v != action.verb]))
    other = _pick(_mistakable(take, used), rng)
    candidates = [(action.verb, used), (verb, used), (action.verb, other), (verb, other)]
    order = rng.permutation(4)
    texts = [render(v, thing, action.hand) for v, thing in (candidates[i] for i in order)]
    return texts, int(np.argmin(order))


def conversation(take: Take, action: Action, rng: np.random.Generator, with_caption: float) -> list[dict[str, str]]:
    """Return four turns about one clip in random order; with probability ``with_caption``, one asks for the caption.

    In a world with phrasings there are two, since a pretrained language model needs less practice in answering, and
    later answers of a conversation can be read off earlier ones. Its captions are phrased as narrations are, which a
    language model that is frozen in the later stages could not learn there.
    """
    asked = [(question, answer) for _, question, answer in answers(take, action, rng)]
    narrated = camera_wearer_text(take.narration(action))
    assert narrated is not None
    captions = [(CAPTION_INSTRUCTION, narrated)] if rng.random() < with_caption else []
    count = 2 if take.world.phrasings else 4
    turns = captions + [asked[i] for i in rng.permutation(len(asked))[: count - len(captions)]]
    messages: list[dict[str, str]] = []
    for index in rng.permutation(len(turns)):
        question, answer = turns[index]
        tag = "" if messages else "<video>\n"  # the clip belongs to the first question
        messages.append({"from": "human", "value": tag + question})
        messages.append({"from": "gpt", "value": answer})
    return messages


def held_out_questions(take: Take, action: Action, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the validation questions about a clip: a caption, a four-way choice and every question."""
    choices, true = options(take, action, rng)
    asked: list[dict[str, Any]] = [
        {
            "task": "caption",
            "question": CAPTION_INSTRUCTION,
            "answer": caption(take, action),
            "parts": parts(take, action),
        },
        {"task": "choice", "question": CAPTION_INSTRUCTION, "answer": choices[true], "options": choices},
    ]
    return asked + [
        {"task": f"qa_{kind}", "question": question, "answer": answer}
        for kind, question, answer in answers(take, action, rng)
    ]


def write_templates(folder: Path) -> None:
    """Write templates in the world's small vocabulary, for ``egoit.templates`` and for the benchmarks (egobench.yaml).

    The first template of a task asks the question as the validation questions do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task, (answer, asked, more) in _TEMPLATES.items():
        bases = [frame.format(asked) for frame in _FRAMES]
        entries = [{"id": number, "base": base, "task": more, "ego": _EGO} for number, base in enumerate(bases)]
        bank = {"answer": answer, "order": ["ego", "task", "base"], "default": entries}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(bank, sort_keys=False))
    (folder / "egobench.yaml").write_text(yaml.safe_dump(BENCHMARK_PROMPTS, sort_keys=False))


def write_tokenizer(folder: Path, world: World = PRESETS["easy"]) -> None:
    """Write a word-level tokenizer of a world's language, loadable by ``AutoTokenizer``."""
    # The vocabulary: the words and marks of every text that the world can contain.
    things = [Thing(kind, colour) for kind, colour in product(world.named_kinds, world.named_colours)]
    texts = [CAPTION_INSTRUCTION, *QUESTIONS.values(), "yes no", "{thing}", *_MORE_TEXTS]
    texts += [full_caption(verb, thing, hand) for verb, thing, hand in product(VERBS, things, HANDS)]
    if world.phrasings:
        texts += [*chain(*PHRASED_QUESTIONS.values()), *YES_NO_QUESTIONS.values()]
        texts += [camera_wearer_text(phrasing.format(verb="", thing="", hand="")) or "" for phrasing in PHRASINGS]
    words: set[str] = set()
    for text in texts:
        words.update(_MARKS.findall(text.replace("{thing}", "").replace("{}", "")))
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocabulary = {word: index for index, word in enumerate(specials + sorted(words))}
    # Encoding splits at spaces and around marks; decoding joins marks to their words again.
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_PUNCTUATION), "isolated")]
    )
    joined = [("( ", "("), (" )", ")"), (" :", ":")]
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            *(decoders.Replace(apart, together) for apart, together in joined),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def _mistakable(take: Take, used: Thing) -> list[Thing]:
    """Return objects to confuse the used one with: the scene's others, else different ones of the world."""
    others = [thing for thing in take.things if thing != used]
    kinds, colours = KINDS[: take.world.kinds], list(COLOURS)[: take.world.colours]
    if others:
        return others
    return [Thing(k, c) for k, c in product(kinds, colours) if k != used.kind and c != used.colour]


def _other_thing(take: Take, used: Thing, rng: np.random.Generator) -> Thing:
    """Return an object that the action does not use: another colour, another kind, or both."""
    other = _pick(_mistakable(take, used), rng)
    return _pick([other, Thing(used.kind, other.colour), Thing(other.kind, used.colour)], rng)


def _pick(things: list[Thing], rng: np.random.Generator) -> Thing:
    return things[int(rng.integers(len(things)))]
