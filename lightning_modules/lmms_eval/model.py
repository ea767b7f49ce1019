"""An exported folder as a model of lmms-eval 0.7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

VIDEO_TAG = "<video>"
_SAMPLING = ("do_sample", "temperature", "top_p", "num_beams")
_SPAN = {"video_start": "start", "video_end": "end"}
"""Names that tasks of lmms-eval give to the bounds of a clip, and ours."""


class Exo2EgoModel(lmms):
    """Answers and scores requests about one video each, as the exported folder does by itself.

    A task's ``doc_to_visual`` returns one video: a path, or a mapping with ``path`` and optionally ``start`` and
    ``end`` (or ``video_start`` and ``video_end``) in seconds. Frames are chosen as in training, whatever a task or
    another model's arguments ask for.

    Args:
        pretrained: folder that ``make export`` wrote, or its name on the Hugging Face hub.
        device: the first GPU by default, or the CPU where there is none.
        dtype: ``float32`` or ``bfloat16``; by default float32 on a CPU, and on a GPU the type of training.
        batch_size, max_batch_size: accepted and ignored: no result depends on other requests.

    Raises:
        OSError: there is no such folder.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = torch.device(device or self.accelerator.device) if self._world_size == 1 else self.accelerator.device
        model: Any = AutoModelForImageTextToText.from_pretrained(pretrained, trust_remote_code=True)
        trained_in = model.config.description["dtype"]
        chosen = dtype or ("float32" if place.type == "cpu" else trained_in)
        self.model = model.to(place, getattr(torch, chosen)).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer requests, greedily unless a task asks for sampling.

        Returns:
            The answers, cut at the stop strings of the task.
        """
        answers = []
        for request in tqdm(requests, disable=self.rank != 0, desc="exo2ego answers"):
            context, options, doc_to_visual, doc_id, task, split = request.args
            inputs = self._inputs(context, doc_to_visual(self.task_dict[task][split][doc_id]), task)
            tokens = self.model.generate(**inputs, **_generation(options))
            (text,) = self.processor.post_process_image_text_to_text(tokens)
            for stop in _stop_strings(options):
                text = text.partition(stop)[0]
            answers.append(text)
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Score given answers; successive ones to the same question share the reading of the clip.

        Returns:
            For each, as ``text``, the loss and whether greedy decoding gives it. The loss is the negative mean
            log-likelihood per token with the end token; tasks of lmms-eval choose the smallest. lmms-eval 0.7.3 turns
            plain tuples into text, after which no task can read them.
        """
        results: list[GenerationResult] = []
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="exo2ego scores")
        for _, group in groupby(requests, key=lambda request: (request.args[0], *request.args[3:])):
            found = self._score(list(group))
            results += map(GenerationResult, found)
            bar.update(len(found))
        bar.close()
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks of several rounds.

        Raises:
            ValueError: always.
        """
        raise ValueError("exo2ego: tasks of several rounds are not supported: choose tasks of one round")

    def _score(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Score answers to one question about one clip."""
        if len(requests[0].args) < 6:
            raise ValueError("acc_mutual_info: asks for likelihoods without the video: remove this metric of the task")
        context, _, doc_to_visual, doc_id, task, split = requests[0].args
        doc = self.task_dict[task][split][doc_id]
        texts = [request.args[1] for request in requests]
        answers = [text if isinstance(text, str) else text(doc) for text in texts]
        inputs = self._inputs(context, doc_to_visual(doc), task)
        tokens = self.processor.encode_answers(_plain(context), answers)
        log_p, is_greedy = self.model.log_likelihoods(
            inputs["input_ids"], inputs["pixel_values_videos"], [tuple(row) for row in tokens]
        )
        losses = [-value / len(row) for value, row in zip(log_p.tolist(), tokens, strict=True)]
        return list(zip(losses, is_greedy.tolist(), strict=True))

    def _inputs(self, context: str, visuals: Sequence[Any], task: str) -> dict[str, Any]:
        """Return the inputs of the model for a question about a video."""
        video = visuals[0] if len(visuals) == 1 else None
        if isinstance(video, str):
            video = {"path": video}
        if not isinstance(video, Mapping):
            kinds = ", ".join(type(visual).__name__ for visual in visuals) or "nothing"
            raise ValueError(
                f"{task}: doc_to_visual returned {kinds}, expected the path of one video: choose video tasks"
            )
        video = {_SPAN.get(name, name): value for name, value in video.items()}
        content = [{**video, "type": "video"}, {"type": "text", "text": _plain(context)}]
        inputs = self.processor.apply_chat_template([{"role": "user", "content": content}])
        return {name: value.to(self.model.device) for name, value in inputs.items()}


def _plain(context: str) -> str:
    """Return a question without a mark for the video, whose place is the same in every question."""
    return context.replace(VIDEO_TAG, "").strip()


def _generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``generate`` for those of a task."""
    chosen = {key: options[key] for key in _SAMPLING if options.get(key) is not None}
    if not chosen.get("temperature") and not chosen.get("do_sample"):
        chosen = {"num_beams": chosen.get("num_beams", 1), "do_sample": False}
    elif "do_sample" not in chosen:
        chosen["do_sample"] = True
    if options.get("max_new_tokens") is not None:
        chosen["max_new_tokens"] = options["max_new_tokens"]
    return chosen


def _stop_strings(options: Mapping[str, Any]) -> list[str]:
    stops = options.get("until") or []
    return [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
