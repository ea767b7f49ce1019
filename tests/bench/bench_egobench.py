"""Measure the gain of a shared clip prefix: 100 clips against 50 captions with the generated world's model.

::

    make bench-egobench

The same model scores every pair in three ways: each pair in a row of its own, all captions of a clip in one batch of
whole rows, and all captions of a clip after one shared prefix. The ways alternate; no encoder runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from datamodules.batch import VIDEO_TOKEN_ID
from datamodules.toy_world.questions import write_tokenizer
from lightning_modules.config import compose
from lightning_modules.model.prefix_cache import SharedPrefix
from lightning_modules.run import build_stage
from lightning_modules.validation.report import markdown_table

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "toy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100, help="rows of the matrix")
    parser.add_argument("--captions", type=int, default=50, help="columns of the matrix")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        stage = build_stage(compose(EXPERIMENT, "stage3", [f"tokenizer={folder}"]))
        stage.init = {}  # speed does not depend on the weights
        stage.configure_model()
    model = stage.model.language_model.eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = stage.vocab_size
    captions = [
        tuple(torch.randint(5, vocabulary, (6 + n % 4,), generator=generator).tolist()) for n in range(options.captions)
    ]
    prompt = (1, VIDEO_TOKEN_ID, 3, 7, 8, 9, 4)
    seconds: dict[str, list[float]] = {"a row a pair": [], "rows in a batch": [], "one reading": []}
    largest = 0.0
    for _ in range(options.clips):
        visual = torch.randn(1, 36, model.dim, generator=generator)
        scores = {}
        for way, score in (("a row a pair", alone), ("rows in a batch", batched), ("one reading", packed)):
            begun = time.perf_counter()
            with torch.no_grad():
                scores[way] = score(model, prompt, captions, visual)
            seconds[way].append(time.perf_counter() - begun)
        largest = max(largest, *((scores[way] - scores["a row a pair"]).abs().max().item() for way in scores))
    base = statistics.median(seconds["one reading"])
    rows = [["scores of a clip", "ms (median)", "of one reading"]]
    rows += [[w, f"{1e3 * statistics.median(s):.1f}", f"{statistics.median(s) / base:.1f}"] for w, s in seconds.items()]
    print(markdown_table(rows))
    print(f"{options.clips} x {options.captions} pairs; largest difference of a log-likelihood {largest:.1e}")


def alone(model, prompt, captions, visual):
    return torch.cat([batched(model, prompt, [caption], visual) for caption in captions])


def batched(model, prompt, captions, visual):
    longest = len(prompt) + max(map(len, captions))
    ids = torch.zeros(len(captions), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, -100)
    for row, caption in enumerate(captions):
        whole = torch.tensor(prompt + caption)
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, True
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return model.token_log_likelihood(ids, mask, labels, visual.expand(len(captions), -1, -1))[0]


def packed(model, prompt, captions, visual):
    at = prompt.index(VIDEO_TOKEN_ID)
    before, behind = (model.embed(torch.tensor(part)) for part in (prompt[:at], prompt[at + 1 :]))
    return SharedPrefix(model, torch.cat([before, visual[0], behind])).log_likelihoods(captions)


if __name__ == "__main__":
    main()
