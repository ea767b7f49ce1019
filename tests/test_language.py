"""Plain English and the field's terms: words of the project's early private language stay out of the repository."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".yaml", ".md", ".sh", ".toml", ""}
# The changelog names the past, this file names the words, and the other two are texts and outputs of others.
EXCLUDED = {"CHANGELOG.md", "tests/test_language.py", "LICENSE", "docs/results/results.md"}

# Searched in whole files: names, docstrings, comments, messages, YAML, Markdown. An underscore ends a word.
WORDS = {
    "mend": (r"mend(s|ed|ing)?", "fix, how to fix it"),
    "anew": (r"anew", "again, from scratch"),
    "go on": (r"(go|goes|going|went|gone) on", "resume, continue"),
    "beside": (r"beside", "next to, alongside, in addition to"),
    "picture": (r"pictures?", "frame, image"),
    "hand-off": (r"hand-offs?|handed on", "stage weights, exported weights"),
    "data set": (r"data sets?", "dataset"),
    "exam": (r"exams?|examiners?|sittings?", "Instance, Request, Evaluator"),
    "funnel": (r"funnels?|tally|tallies", "filter statistics, counts"),
    "words_loss": (r"(?<!of_)words_(loss|weight)", "bag-of-words loss, bow_weight"),
    "wording": (r"wordings?|worded|as_written|prompt_level", "prompt fields, rendered, raw, prompt style"),
    "learner_reads": (r"learner_reads", "visual_inputs"),
    "skipped": (r"(max_)?skipped_share", "max_corrupt_fraction"),
    "held-out outcome": (r"judge_choice|judge_text", "score_choice: a judge is a language model"),
    "how it runs": (r"how_it_runs|put_aside|same_configuration", "RESUMABLE_KEYS, discard_run, check_resumable"),
}
# Searched in the names of Python code only, in their parts between underscores and capitals.
NAME_PARTS = {"told", "said", "voices", "filmed", "grown", "readable"}
FIRST_WORDS = re.compile(r"(What|Whether|Where|Which|How|Why|Of|As|Those|That)\b")
# A clause in the place of a noun, as an explanation: "marker: what is put in", "(what the model gives)".
WHAT = r"(?-i:(?::|#|\(|\"\"\"|=) what (is|are|the|a|it|they|of|was|has)\b)"

# Uses that are right where they are: (file, rule) to their number.
EXCEPTIONS: dict[tuple[str, str], int] = {
    ("lightning_modules/config.py", "wording"): 4,  # the old name of a key
    ("tests/test_config.py", "wording"): 3,  # the same
    ("lightning_modules/config.py", "skipped"): 1,  # the old name of a key
    ("lightning_modules/config.py", "words_loss"): 1,  # the old name of a key
    ("lightning_modules/config.py", "learner_reads"): 3,  # the old name of a key
    ("tests/test_config.py", "learner_reads"): 2,  # the same
    ("datamodules/ego_exo_clip/index.py", "funnel"): 2,  # a key of index files that exist
    ("tests/test_conversations.py", "wording"): 1,  # a field of record files that exist
    ("datamodules/egobench/egomcq.py", "wording"): 2,  # the old name of a key, and of its value
    ("tests/test_egobench_loaders.py", "wording"): 3,  # the same
    ("datamodules/video/remote.py", "names"): 1,  # the name of a method of Python's files
}


def files():
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode or not run.stdout:
        pytest.skip("not a git checkout")
    names = [name for name in run.stdout.splitlines() if name not in EXCLUDED and not name.startswith(".")]
    return [name for name in names if Path(name).suffix in SUFFIXES and (ROOT / name).is_file()]


@cache
def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def search(pattern, names):
    """Yield (file, line number, line) of every match."""
    pattern = re.compile(pattern, re.IGNORECASE)
    for name in names:
        text = text_of(name)
        for match in pattern.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            yield name, number, text.splitlines()[number - 1].strip()


def names_in(name):
    """Yield (name, line number) of every identifier of a Python file, each once a line."""
    for token in tokenize.generate_tokens(io.StringIO(text_of(name)).readline):
        if token.type == tokenize.NAME:
            yield token.string, token.start[0]


def docstrings(name):
    for node in ast.walk(ast.parse(text_of(name), name)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring, node.body[0].lineno


def offences(rule):
    names = files()
    python = [name for name in names if name.endswith(".py")]
    if rule in WORDS:
        # Line breaks may stand in for the space of two words.
        pattern = WORDS[rule][0].replace(" ", r"(?: |\n *#? *)")
        yield from search(rf"(?<![a-z])(?:{pattern})(?![a-z])", names)
    elif rule == "names":
        for name in python:
            for word, number in names_in(name):
                parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", word).lower().split("_")
                if NAME_PARTS.intersection(parts):
                    yield name, number, word
    elif rule == "first line":
        for name in python:
            for docstring, number in docstrings(name):
                if FIRST_WORDS.match(docstring):
                    yield name, number, docstring.splitlines()[0]
    elif rule == "what":
        # Prompts are plain questions to a model, not descriptions of code.
        prompts = ("datamodules/egoit/templates/", "datamodules/egobench/prompts")
        yield from search(WHAT, [name for name in names if not name.startswith(prompts)])


RULES = {**{rule: instead for rule, (_, instead) in WORDS.items()}}
RULES["names"] = "plain names; no told, said, voices, filmed, grown, readable"
RULES["first line"] = "a sentence that begins with a verb, or names the thing"
RULES["what"] = "the noun itself: 'the output', not 'what it gives'"


@pytest.mark.parametrize("rule", RULES)
def test_private_words(rule):
    found = list(offences(rule))
    per_file = Counter(name for name, _, _ in found)
    lines = [
        f"{name}:{number}: {line}" for name, number, line in found if per_file[name] > EXCEPTIONS.get((name, rule), 0)
    ]
    assert not lines, f"write {RULES[rule]} instead:\n" + "\n".join(lines)


def test_exceptions_are_needed():
    for (name, rule), number in EXCEPTIONS.items():
        assert sum(where == name for where, _, _ in offences(rule)) == number, (name, rule)
