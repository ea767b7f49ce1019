"""Answers in the words of the one who wears the camera: "C picks up the cup." becomes "I pick up the cup.".

The rules are for the sentences of narrations: the wearer, maybe adverbs, a verb in the present, and further verbs after
"and", "then" or a comma. A text that does not name the wearer stays as it is.
"""

from __future__ import annotations

import re

from datamodules.ego_exo_clip.sources.ego_exo4d import spell_out_wearer

_TAG = re.compile(r"#[CO]\s+")
_SENTENCE = re.compile(r"[^.!?]+[.!?]*\s*")
_WEARER = r"(?:the\s+)?\bcamera[- ]?wearer\b"
_POSSESSIVE = re.compile(rf"{_WEARER}['\u2019]s\b", re.IGNORECASE)
_HANDS_OF = re.compile(rf"\b(?:the\s+)?((?:(?:left|right|both|two)\s+)?hands?)\s+of\s+{_WEARER}", re.IGNORECASE)
_PREPOSITION = re.compile(r"\b(?:about|at|behind|by|for|from|near|of|on|past|to|towards?|with)\s+$", re.IGNORECASE)
_LETTER = re.compile(r"\s*\(?[A-Z](?:[.):]|\s*$)")
_MENTION = re.compile(
    rf"{_WEARER}(?P<adverbs>(?:\s+(?:\w+ly|also|always|now|often|still|then))*)(?:\s+(?P<verb>[a-z]+?(?:n['\u2019]t)?)(?![\w'\u2019]))?",
    re.IGNORECASE,
)
_FURTHER = re.compile(
    r"(?P<before>(?:,\s*|\b(?:and|but|or|then)\s+)+(?:\w+ly\s+)?)(?P<verb>[a-z]+s)(?=$|[\s,.!?;])", re.IGNORECASE
)
_OTHERS = re.compile(
    r"\b(?:person|people|man|men|woman|women|boy|girl|lady|child|children|baby|friend|someone|somebody|[A-Z](?=\s+[a-z]))\b"
)
_OWN = re.compile(
    r"\b(?:his|her|their)(?=\s+(?:(?:left|right|both|own|two)\s+)?(?:arm|body|chest|face|feet|finger|foot|hair|hand|head|"
    r"knee|lap|leg|mouth|palm|pocket|shirt|shoe|shoulder|sleeve|thumb|trouser|wrist)s?\b)",
    re.IGNORECASE,
)
_SELF = re.compile(r"\b(?:himself|herself|themselves|themself)\b")
_AFTER_I = {"was", "did", "had", "can", "could", "may", "might", "must", "should", "will", "would"}
_IRREGULAR = {"is": "am", "isn't": "am not", "has": "have", "hasn't": "haven't", "does": "do", "doesn't": "don't"}
_VERBS = frozenset(
    """add adjust apply arrange attach beat begin bend blend blow boil bounce break bring brush build carry
    catch change check chop clean climb close collect connect continue cook cover crack cut dig dip drag draw
    drink drive drop dry eat empty enter examine feed fetch fill fit fix flip fold gather get give go grab
    grasp grate hammer hang hit hold insert inspect iron join keep kick kneel knead lay lean leave lift light
    look loosen lower make mark measure mix move open operate pack paint pass peel pet pick place plant play
    point pour press pull push put raise reach read release remove repeat rest return rinse roll rotate rub
    run sand scoop scrape screw scroll scrub season separate set sew shake sharpen shift shuffle sit slice
    slide smell smooth soak spin split spray spread sprinkle squeeze stack stand start step stick stir stop
    straighten stretch sweep swing switch take tap taste tear test throw tie tighten tilt toss touch transfer
    trim try turn twist type unfold unlock unscrew untie use wait walk wash watch wave wear wet wipe wrap
    write""".split()
)
"""Verbs that continue a sentence after "and": other words that end in s may be things, as in "knives and forks"."""


def first_person(text: str) -> str:
    """Return a text about the camera-wearer as the wearer would say it; any other text unchanged.

    An answer that begins with the letter of an option stays as it is, too, to agree with the options.

    Args:
        text: an answer.
    """
    if _LETTER.match(text):
        return text
    spelled = spell_out_wearer(_TAG.sub("", text))
    if re.search(_WEARER, spelled, re.IGNORECASE) is None:
        return text
    return "".join(_sentence(sentence) for sentence in _SENTENCE.findall(spelled))


def _sentence(text: str) -> str:
    """Rewrite one sentence."""
    text = _POSSESSIVE.sub(lambda found: _cased("my", found), text)
    text = _HANDS_OF.sub(lambda found: f"{_cased('my', found)} {found[1].lower()}", text)
    is_subject = False

    def mention(found: re.Match[str]) -> str:
        nonlocal is_subject
        verb = found["verb"]
        before = found.string[: found.start()]
        if verb is None or not _is_finite(verb.lower()) or _PREPOSITION.search(before):
            return f"me{found[0][len(re.match(_WEARER, found[0], re.IGNORECASE)[0]) :]}"  # type: ignore[index]
        is_subject = True
        return f"I{found['adverbs']} {_base(verb)}"

    text = _MENTION.sub(mention, text)
    if not is_subject:
        return text
    text = _FURTHER.sub(_further, text)
    if _OTHERS.search(text.replace("I ", "")) is None:  # else it is not clear whose they are
        text = _OWN.sub(lambda found: _cased("my", found), text)
        text = _SELF.sub("myself", text)
    return text


def _further(found: re.Match[str]) -> str:
    base = _base(found["verb"])
    return found["before"] + (base if base in _VERBS else found["verb"])


def _is_finite(verb: str) -> bool:
    """Return whether a word after the wearer is its verb, so that the wearer is the subject."""
    return verb in _AFTER_I or verb in _IRREGULAR or verb.endswith("ed") or (verb.endswith("s") and verb[-2:] != "ss")


def _base(verb: str) -> str:
    """Return the form of a verb after "I"."""
    verb = verb.replace("\u2019", "'")
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if verb in _AFTER_I or not verb.endswith("s"):
        return verb
    if verb.endswith("ies") and len(verb) > 4:
        return f"{verb[:-3]}y"
    if verb.endswith(("sses", "shes", "ches", "xes", "zzes", "oes")):
        return verb[:-2]
    return verb[:-1]


def _cased(word: str, found: re.Match[str]) -> str:
    """Return a word with a capital where it begins a sentence."""
    is_start = found.start() == 0 and found[0][:1].isupper()
    return word.capitalize() if is_start else word
