"""Judge open answers with a language model: the protocol of Video-ChatGPT without an API.

A judge sees question, reference and prediction and replies with ``{'pred': 'yes' | 'no', 'score': 0 to 5}``. Accuracy
is yes / (yes + no), the score is the mean. Invalid replies are counted by themselves, never as "no". Judges differ by
several points: every metric carries its judge's name, and none is the paper's.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.io.hub import use_cache_without_network
from datamodules.io.jsonl import read_jsonl, require
from lightning_modules.egobench.fields import PlacedRow
from lightning_modules.egobench.metrics import Estimate, binomial_error
from lightning_modules.egobench.scores import Header, Score

ASKED = ("question", "answer", "prediction")
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class JudgeConfig:
    """The key ``judge``: the judge of open answers.

    Attributes:
        kind: ``none``. ``file``: requests are written to ``<benchmark>.judge_requests.jsonl``, and replies made
            elsewhere are read from ``<benchmark>.judge_replies.jsonl`` once that is there. ``hf``: a local instruct
            model.
        model: folder or hub name for ``hf``; for ``file`` the name of the judge, which becomes part of metric names.
    """

    kind: Literal["none", "file", "hf"] = "none"
    model: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("none", "file", "hf"):
            raise ValueError(f"judge.kind: {self.kind!r}, allowed: none, file, hf")
        if self.kind == "hf" and not self.model:
            raise ValueError("judge.model: is missing: set it to the folder of an instruct model")

    @property
    def name(self) -> str:
        """Name in files and metrics."""
        return re.sub(r"[^\w.-]+", "-", Path(self.model).name if self.model else self.kind)


class Verdict(NamedTuple):
    """The decision of a judge."""

    right: bool
    score: int


def judge(header: Header, rows: Sequence[PlacedRow], folder: Path, config: JudgeConfig) -> list[Score]:
    """Score the open answers of one benchmark by a judge; no scores without one, or before its replies exist.

    Args:
        header, rows: a benchmark with the task ``open``.
        folder: of requests and replies.
        config: the judge.

    Raises:
        ValueError: a reply belongs to no row, or to another prediction; the message names file, line, field and how to
            fix it.
    """
    if config.kind == "none":
        return []
    requests = {row["id"]: {name: row[name] for name in ("id", *ASKED)} for _, row in rows}
    if config.kind == "file":
        asked, replies = (folder / f"{header.benchmark}.judge_{kind}.jsonl" for kind in ("requests", "replies"))
        if replies.is_file() and asked.is_file():
            _require_same(asked, requests, replies)
        _write(asked, requests.values())
    else:
        replies = folder / f"{header.benchmark}.judge_replies.{config.name}.jsonl"
        _write(replies, _ask(list(requests.values()), str(config.model)))
    if not replies.is_file():
        return []
    verdicts = _read(replies, requests)
    return _score(header, [verdicts[key] for key in sorted(verdicts)], f"judge_{config.name}") if verdicts else []


def prompt(request: dict[str, str]) -> str:
    """Return the judge's prompt."""
    return (
        "You grade answers to questions about a video. You cannot see the video; trust the reference answer.\n"
        "An answer is right if it means the same as the reference, in whatever words. More detail is no fault, "
        "a contradiction is.\n\n"
        f"Question: {request['question']}\n"
        f"Reference answer: {request['answer']}\n"
        f"Answer to grade: {request['prediction']}\n\n"
        "Reply with one Python dictionary and nothing else. Its key 'pred' is 'yes' if the answer is right, else 'no'. "
        "Its key 'score' is an integer from 0 (nothing matches) to 5 (the same meaning).\n"
        "Example of the form: {'pred': 'no', 'score': 2}"
    )


def read_reply(reply: str) -> Verdict | None:
    """Parse a judge's reply: its first dictionary, as a Python literal; None if there is no valid one."""
    found = re.search(r"\{[^{}]*\}", reply)
    try:
        return _verdict(ast.literal_eval(found[0])) if found else None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _verdict(value: Any) -> Verdict | None:
    if not isinstance(value, dict):
        return None
    pred, score = str(value.get("pred")).strip().lower(), value.get("score")
    if pred not in ("yes", "no") or not isinstance(score, int | float | str) or isinstance(score, bool):
        return None
    try:
        number = float(score)
    except (ValueError, OverflowError):
        return None
    return Verdict(pred == "yes", int(number)) if 0 <= number <= 5 else None


def _require_same(asked: Path, requests: dict[str, dict[str, str]], replies: Path) -> None:
    """Refuse replies to earlier requests; replies need not repeat the prediction, so that they do not show it."""
    for where, row in read_jsonl(asked):
        if row != requests.get(row["id"], row):
            raise ValueError(
                f"{where}: field 'prediction' differs from the prediction, so {replies.name} judges other "
                f"predictions: move {replies} away, and have the new requests judged"
            )


def _read(file: Path, requests: dict[str, dict[str, str]]) -> dict[str, Verdict | None]:
    verdicts: dict[str, Verdict | None] = {}
    for where, row in read_jsonl(file):
        key = require(row, "id", where)
        if not isinstance(key, str) or key not in requests:
            raise ValueError(f"{where}: field 'id' is {key!r}, which no prediction has: remove the line")
        if key in verdicts:
            raise ValueError(f"{where}: field 'id' is {key!r} as in an earlier line: remove one of the two")
        if row.get("prediction", requests[key]["prediction"]) != requests[key]["prediction"]:
            raise ValueError(f"{where}: field 'prediction' differs from the prediction: have the new requests judged")
        verdicts[key] = read_reply(row["reply"]) if isinstance(row.get("reply"), str) else _verdict(row)
    return verdicts


def _score(header: Header, replies: Sequence[Verdict | None], name: str) -> list[Score]:
    verdicts = [verdict for verdict in replies if verdict is not None]
    invalid, n = len(replies) - len(verdicts), len(verdicts)
    rate = invalid / len(replies)
    failed = Estimate(rate, binomial_error(rate, len(replies)), None, len(replies))
    scores = [header.score(f"{name}_unreadable", failed, len(replies))]
    if n:
        right = sum(verdict.right for verdict in verdicts) / n
        mean = sum(verdict.score for verdict in verdicts) / n
        spread = math.sqrt(sum((verdict.score - mean) ** 2 for verdict in verdicts)) / n
        scores.insert(0, header.score(f"{name}_acc", Estimate(right, binomial_error(right, n), None, n), n))
        scores.insert(1, header.score(f"{name}_score", Estimate(mean, spread, None, n), n, unit="points"))
    return scores


@torch.inference_mode()
def _ask(requests: Sequence[dict[str, str]], model: str) -> Iterator[dict[str, str]]:
    """Yield the replies of a local model, decoded greedily, with the request's id and prediction."""
    local = Path(model).is_dir()
    if not local:
        use_cache_without_network()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=local)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=local)
    network = network.to(device).eval()
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    for request in requests:
        text = prompt(request)
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids.to(device)
        made = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=min(ends, default=0),
        )
        reply = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        yield {"id": request["id"], "prediction": request["prediction"], "reply": reply}


def _write(file: Path, rows: Any) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
