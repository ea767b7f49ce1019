"""Measure how fast a trained model answers.

::

    make bench-answer

The time to the first token about a new clip and about one that was asked about before, and tokens and answers per
second for one and for several rows that are decoded together: questions about one clip (``Exo2Ego.answer``, EgoBench)
and different clips (``Exo2Ego.describe``, validation). For clips, transformers' static cache is measured next to the
usual one; on a GPU, transformers compiles the step with it. In float32 all ways must give equal answers.

All answers have the same length, whatever the model would say. Without a finished stage 3, a model of the experiment's
shape with random weights is measured.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from datamodules.text import TextEncoder
from datamodules.toy_world.questions import write_tokenizer
from datamodules.toy_world.render import Camera
from datamodules.toy_world.video import encode
from lightning_modules import Exo2Ego
from lightning_modules.config import compose
from lightning_modules.inference.description import describe_config
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.run import build_stage
from lightning_modules.validation.report import markdown_table

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SIZE = 256
"""Side of the frames in the video, in pixels."""
NO_TOKEN = 1 << 40
STATIC = "clips, static cache"


class EndlessAnswers(Exo2Ego):
    """A model whose answers have ``max_new_tokens`` tokens: none of them ends an answer."""

    _end = NO_TOKEN


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run, exported folder, or name on the hub; default: stage 3 of the experiment")
    parser.add_argument("--experiment", default="toy", help="whose stage 3, or shape, is measured")
    parser.add_argument("--runs", default="runs", help="folder of the runs of all experiments")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="decoded together")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at least 2")
    parser.add_argument("--repeats", type=int, default=7, help="of every measurement; the shortest counts")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "clip.mp4"
        write_video(video)
        run = Path(options.runs) / options.experiment / "stage3"
        if options.model or (run / "handoff" / "manifest.json").is_file():
            model = EndlessAnswers.from_pretrained(options.model or run, options.device)
        else:
            print(f"{run} is not finished: random weights")
            model = random_model(options.experiment, Path(folder), options.device)
        measure = Measurement(model, video, options.tokens, options.repeats)
        count = sum(parameter.numel() for parameter in model.model.parameters())
        dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
        card = torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {options.threads} thread(s)"
        print(f"{model.name}: {count / 1e6:,.1f} million parameters, {dtype}, {card}\n")
        print(markdown_table(measure.first_tokens()))
        print()
        print(markdown_table(measure.decoding(options.rows)))


def write_video(path: Path) -> None:
    """Write 4 s of moving noise."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    centre = np.zeros((32, 3), dtype=np.float32)
    camera = Camera(centre, centre, centre, fov_deg=90.0, width=SIZE, height=SIZE)
    encode(path, (np.roll(noise, 8 * n, axis=1) for n in range(32)), camera, fps=8)


def random_model(experiment: str, folder: Path, device: str) -> EndlessAnswers:
    """Build a model of an experiment's shape, which answers anything."""
    write_tokenizer(folder / "tokenizer")
    config = compose(EXPERIMENTS / experiment, "stage3", [f"tokenizer={folder / 'tokenizer'}"])
    stage = build_stage(config)
    description = describe_config(config, stage.uses, stage.vocab_size)
    with torch.device(device):
        network = Exo2EgoModel(description.network, description.vocab_size, description.parts)
    dtype = torch.float32 if device == "cpu" else getattr(torch, description.dtype)
    encoder = TextEncoder(stage.tokenizer_name, description.max_text_tokens, description.prompt)
    return EndlessAnswers(network.to(dtype).eval(), encoder, description, f"{experiment} with random weights")


class Measurement:
    """Times answers about one video.

    Args:
        model: whose answers do not end.
        video: file.
        tokens: of an answer.
        repeats: of every measurement.
    """

    def __init__(self, model: EndlessAnswers, video: Path, tokens: int, repeats: int) -> None:
        self.model, self.video, self.tokens, self.repeats = model, video, tokens, repeats
        self.is_float32 = next(model.model.parameters()).dtype == torch.float32

    def first_tokens(self) -> list[list[str]]:
        """Return the rows of the table of times to the first token."""
        ask = partial(self.model.answer, self.video, question(0), max_new_tokens=1)
        ask()
        new, known = math.inf, math.inf
        for _ in range(self.repeats):
            self.model._prefixes.clear()
            new = min(new, seconds(ask))
            known = min(known, seconds(ask))
        rows = [["time to the first token", "ms"]]
        return [*rows, ["first question about a clip", f"{1e3 * new:.1f}"], ["second question", f"{1e3 * known:.1f}"]]

    def decoding(self, sizes: Sequence[int]) -> list[list[str]]:
        """Return the rows of the table of decoding.

        Raises:
            RuntimeError: in float32, one way of decoding gives other answers than another.
        """
        cases: list[tuple[str, int, Callable[[int], object]]] = []
        for size in sizes:
            texts = [question(number) for number in range(size)]
            if self.is_float32:
                alone = [self.model.answer(self.video, text, max_new_tokens=self.tokens) for text in texts]
                if self.questions(texts, self.tokens) != alone:
                    raise RuntimeError(f"{size} questions that are decoded together have other answers than each alone")
            cases.append(("questions about one clip", size, partial(self.questions, texts)))
        visual = self.model.visual_tokens(self.model.look(self.video).frames)
        for static in (False, True):
            for size in sizes:
                clips = visual.expand(size, -1, -1)
                answers = self.clips(clips, self.tokens, static)  # compiles, where anything is compiled
                if self.is_float32 and answers != self.clips(clips, self.tokens):
                    raise RuntimeError(f"{size} clips have other answers with a static cache")
                cases.append((STATIC if static else "clips", size, partial(self.clips, clips, static=static)))

        # One after the other in turn, so that a busy moment does not slow all repeats of one case.
        whole, first = [math.inf] * len(cases), [math.inf] * len(cases)
        for _ in range(self.repeats):
            for number, (_, _, answer) in enumerate(cases):
                whole[number] = min(whole[number], seconds(partial(answer, self.tokens)))
                first[number] = min(first[number], seconds(partial(answer, 1)))
        rows = [["decoded together", "rows", "ms a step", "tokens/s", "answers/s"]]
        for number, (title, size, _) in enumerate(cases):
            step = (whole[number] - first[number]) / (self.tokens - 1)
            rates = [f"{1e3 * step:.1f}", f"{size / step:,.0f}", f"{size / whole[number]:,.1f}"]
            rows.append([title, str(size), *rates])
        return rows

    def questions(self, texts: list[str], tokens: int) -> object:
        """Answer questions about the clip, whose keys are kept."""
        return self.model.answer(self.video, texts, max_new_tokens=tokens)

    def clips(self, visual: torch.Tensor, tokens: int, static: bool = False) -> list[list[int]]:
        """Answer one question about several clips.

        Args:
            visual: their visual tokens, float [B, N, D].
            tokens: of an answer.
            static: keep keys in tensors of the final length; on a GPU, transformers then compiles the step.
        """
        ids = torch.tensor([self.model.encoder.prompt(question(0)).input_ids], device=visual.device)
        ids = ids.expand(len(visual), -1)
        language_model = self.model.model.language_model
        language_model.causal_lm.generation_config.cache_implementation = "static" if static else None
        return language_model.generate(ids, torch.ones_like(ids), visual, tokens, NO_TOKEN, 0)


def seconds(work: Callable[[], object]) -> float:
    """Return the time of some work, which ends with tokens on the CPU."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def question(number: int) -> str:
    """Return a question; each number has its own."""
    return f"Describe the video{' .' * (number + 1)}"


if __name__ == "__main__":
    main()
