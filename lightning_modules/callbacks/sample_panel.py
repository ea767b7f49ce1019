"""Write the first validation clips to TensorBoard as moving images, with questions, correct and generated answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import lightning as L
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from datamodules.batch import BenchmarkBatch, QuestionBatch
from lightning_modules.callbacks.tensorboard import numbered, write_image
from lightning_modules.validation.report import VIEWS
from lightning_modules.validation.scores import Prediction

_SIDE, _MARGIN, _FONT_SIZE, _LINE = 224, 8, 13, 18
_BLACK, _GREY, _GREEN, _RED = (20, 20, 20), (110, 110, 110), (0, 120, 40), (190, 20, 20)
_CLIP_MS = 4000
_QUESTIONS_SHOWN = 5

Line = tuple[str, tuple[int, int, int]]


class SamplePanel(L.Callback):
    """Write a card for each of the first validation clips, and a table of all answers about them.

    A card moves: the egocentric frames, next to them the exocentric frames of the same instants, and below them
    questions with the correct answer and the model's answers.

    Args:
        clips: number of clips.
    """

    def __init__(self, clips: int = 4) -> None:
        self.clips = clips

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: QuestionBatch | list[BenchmarkBatch],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the first clips of the first batch."""
        if batch_idx or not isinstance(batch, QuestionBatch) or not trainer.is_global_zero or not trainer.loggers:
            return
        writer: Any = getattr(trainer.loggers[0], "experiment", None)
        if not isinstance(writer, SummaryWriter):
            return
        predictions: list[Prediction] = outputs["predictions"]
        videos = {"ego": batch.ego_video, "exo": batch.exo_video}
        for row, name in enumerate(batch.ids[: self.clips]):
            views = {view: video[row].cpu() for view, video in videos.items() if video is not None}
            card, size = clip_card(name, views, [p for p in predictions if p.clip == name])
            write_image(writer, f"val/clip_{row + 1}", card, size, trainer.global_step)

        lines = ["| clip | view | task | question | correct | generated |", "|---|---|---|---|---|---|"]
        for p in predictions:
            row = batch.ids.index(p.clip)
            if row < self.clips:
                lines.append(f"| {row + 1} | {p.view} | {p.task} | {p.question} | {p.answer} | {p.prediction} |")
        writer.add_text(numbered("val/answers"), "\n".join(lines), trainer.global_step)


def clip_card(name: str, views: dict[str, Tensor], predictions: Sequence[Prediction]) -> tuple[bytes, tuple[int, int]]:
    """Draw a validation clip and the answers about it.

    Args:
        name: of the clip.
        views: frames of each view, uint8 [T, S, S, 3].
        predictions: answers about this clip, in any view.

    Returns:
        An animated GIF of T frames, and its width and height in pixels.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    width = max(2, len(views)) * (_SIDE + _MARGIN) + _MARGIN
    lines = _wrap([(name, _GREY), *_answer_lines(predictions)], font, width - 2 * _MARGIN)
    top = _MARGIN + _LINE  # of the frames, below their labels
    size = (width, top + _SIDE + _MARGIN + _LINE * len(lines) + _MARGIN)

    # Labels and text are the same in every frame.
    background = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(background)
    lefts = [_MARGIN + place * (_SIDE + _MARGIN) for place in range(len(views))]
    for left, view in zip(lefts, views, strict=True):
        draw.text((left, _MARGIN - 2), f"{VIEWS[view]} video", _BLACK, font)
    for number, (text, colour) in enumerate(lines):
        draw.text((_MARGIN, top + _SIDE + _MARGIN + _LINE * number), text, colour, font)

    frames = []
    for number in range(len(next(iter(views.values())))):
        frame = background.copy()
        for left, video in zip(lefts, views.values(), strict=True):
            picked = Image.fromarray(video[number].numpy())
            enlarged = Image.Resampling.NEAREST if picked.width < _SIDE else Image.Resampling.BILINEAR
            frame.paste(picked.resize((_SIDE, _SIDE), enlarged), (left, top))
        frames.append(frame)
    encoded = io.BytesIO()
    duration_ms = min(1000, max(100, _CLIP_MS // len(frames)))
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:], duration=duration_ms, loop=0)
    return encoded.getvalue(), size


def _answer_lines(predictions: Sequence[Prediction]) -> list[Line]:
    """Return for the first question of each task the question, the correct answer, and the answer of each view."""
    by_task: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        asked = by_task.setdefault(prediction.task, [])
        if not asked or prediction.question == asked[0].question:
            asked.append(prediction)
    lines: list[Line] = []
    for asked in list(by_task.values())[:_QUESTIONS_SHOWN]:
        lines += [(f"{asked[0].task}: {asked[0].question}", _BLACK), (f"Correct: {asked[0].answer}", _BLACK)]
        for prediction in asked:
            right = prediction.scores.get(prediction.task, 0.0) == 1.0
            verdict = "right" if right else "wrong"
            lines.append((f"From {prediction.view} ({verdict}): {prediction.prediction}", _GREEN if right else _RED))
    return lines


def _wrap(lines: Sequence[Line], font: Any, width: int) -> list[Line]:
    """Break lines at spaces so that none is wider than some pixels."""
    wrapped: list[Line] = []
    for text, colour in lines:
        current = ""
        for word in text.split():
            if current and font.getlength(f"{current} {word}") > width:
                wrapped.append((current, colour))
                current = f"    {word}"
            else:
                current = f"{current} {word}" if current else word
        wrapped.append((current, colour))
    return wrapped
