"""Fit F on frozen features of synchronised videos: which form of the KL leaves room above the mean of y?

``python tests/bench/fit_mapping.py INDEX ROOT EXPERIMENT [key=value ...]``: INDEX is a folder that ``make ego-exoclip``
made of ROOT, EXPERIMENT names network and encoder weights, such as ``experiments/few_takes``. Every camera is encoded
once, every half second. The moments of the first two thirds of each take train F, those of the last third test it.

Each column is a form of the distributions: of each position, or of features averaged over 4 x 4 regions or the frame.
The first rows are bars, the others F(x) of several forms, trained with the KL of that column.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.ego_exo_clip.index import PairIndex
from datamodules.video.probe import probe
from datamodules.video.reader import ClipReader
from lightning_modules.config import compose
from lightning_modules.losses import guidance_kl_loss, log_distributions
from lightning_modules.model.encoders import build_encoder
from lightning_modules.model.mapping import FeatureMapping
from lightning_modules.run import build_stage
from lightning_modules.validation.report import markdown_table
from lightning_modules.weights.resolve import find_weights

EVERY_S, GAP_S = 0.5, 1.0
STEPS, BATCH = 300, 16
ENCODED_AT_ONCE = 32
REGIONS = 4
FORMS = ("each position", "each of 4 x 4 regions", "the whole frame")


def compared(features: Tensor, form: str) -> Tensor:
    """Average float [B, h, w, C] as a form says; [B, 1, h', w', C]."""
    if form == FORMS[1]:
        features = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), REGIONS).permute(0, 2, 3, 1)
    if form == FORMS[2]:
        features = features.mean((1, 2), keepdim=True)
    return features[:, None]


def kl(y: Tensor, other: Tensor, form: str) -> Tensor:
    """KL of the distributions of y to those of other features, float [B, h, w, C] each."""
    valid = torch.ones(len(y), dtype=torch.bool)
    return guidance_kl_loss(compared(y, form), compared(other, form), valid)


def kl_to_constant(y: Tensor, mean: Tensor, form: str) -> Tensor:
    """KL of the distributions of y to given ones, float [P, K]."""
    log_p = log_distributions(compared(y, form))[:, 0]
    return (log_p.exp() * (log_p - mean.log())).sum(-1).mean()


class Moments:
    """Features of all cameras at the same moments.

    Attributes:
        x: float [N, h, w, C], egocentric.
        y: float [N, cameras, h, w, C], exocentric.
        test: bool [N], moments of the last third of their take.
        take: int64 [N].
    """

    def __init__(self, index: PairIndex, root: Path, config: dict) -> None:
        network = build_stage(config).network
        encoder = build_encoder(network.encoder).eval()
        source = config["start"]["encoder"]
        found = find_weights([source] if isinstance(source, str) else source, "exo_encoder", network)
        encoder.load_state_dict({name: tensor.read() for name, tensor in found.tensors.items()})
        self.network = network
        reader, frame_fit = ClipReader(), config["clips"]["frame_fit"]
        x, y, test, takes = [], [], [], []
        for take, (first, end) in enumerate(itertools.pairwise(index.first_view.tolist())):
            paths = [root / index.view_paths[view] for view in range(first, end)]
            offsets_s = index.view_offsets_s[first:end].tolist()
            last = min(probe(path).duration_s + offset for path, offset in zip(paths, offsets_s, strict=True)) - EVERY_S
            split = 2 * last / 3
            times = [t for t in torch.arange(EVERY_S, last, EVERY_S).tolist() if abs(t - split) > GAP_S / 2]
            views = []
            for path, offset in zip(paths, offsets_s, strict=True):
                frames = reader.read(path, [t - offset for t in times], network.encoder.image_size, frame_fit).frames
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    parts = [encoder(part[:, None])[:, 0].float() for part in frames.split(ENCODED_AT_ONCE)]
                views.append(torch.cat(parts))
            x.append(views[0])
            y.append(torch.stack(views[1:], 1))
            test += [t > split for t in times]
            takes += [take] * len(times)
        cameras = min(of_take.shape[1] for of_take in y)
        self.x, self.y = torch.cat(x), torch.cat([of_take[:, :cameras] for of_take in y])
        self.test, self.take = torch.tensor(test), torch.tensor(takes)
        flat = self.y[~self.test].flatten(0, 3)
        mean, deviation = flat.mean(0), flat.std(0)
        self.x, self.y = (self.x - mean) / deviation, (self.y - mean) / deviation


def fit(moments: Moments, mapper: dict, form: str, rate: float, seed: int) -> tuple[float, float]:
    """Train F with the KL of a form; return KL(y, F(x)) of the test moments and the change of x by F."""
    torch.manual_seed(seed)
    mapping = FeatureMapping(moments.x.shape[-1], replace(moments.network.mapper, **mapper))
    optimizer = torch.optim.AdamW(mapping.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    rows = (~moments.test).nonzero().flatten()
    cameras = moments.y.shape[1]
    for _ in range(STEPS):
        chosen = rows[torch.randint(len(rows), (BATCH,))]
        y = moments.y[chosen, torch.randint(cameras, (BATCH,))]
        loss = kl(y, mapping(moments.x[chosen][:, None])[:, 0], form)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, y = moments.x[moments.test], moments.y[moments.test]
    with torch.no_grad():
        mapped = torch.cat([mapping(part[:, None])[:, 0] for part in x.split(ENCODED_AT_ONCE)])
    found = statistics.mean(float(kl(y[:, camera], mapped, form)) for camera in range(cameras))
    return found, float((mapped - x).norm() / x.norm())


def bars(moments: Moments, form: str) -> dict[str, float]:
    """Return the KL of y, of the test moments, to what needs no training."""
    test, cameras = moments.test, range(moments.y.shape[1])
    x, y = moments.x[test], moments.y[test]

    def mean_of(chosen: Tensor) -> Tensor:
        return log_distributions(compared(moments.y[chosen].flatten(0, 1), form))[:, 0].exp().mean(0)

    mean = mean_of(~test)
    to_take = []
    for take in moments.take.unique():
        here, of_take = moments.take == take, mean_of(~test & (moments.take == take))
        to_take += [kl_to_constant(moments.y[test & here, c], of_take, form) for c in cameras]
    found = {
        "uniform": [kl_to_constant(y[:, c], torch.full_like(mean, 1 / mean.shape[-1]), form) for c in cameras],
        "mean of y at each position": [kl_to_constant(y[:, c], mean, form) for c in cameras],
        "the same of the take": to_take,
        "y of another camera at the same moment": [
            kl(y[:, c], y[:, d], form) for c in cameras for d in cameras if c != d
        ],
        "x": [kl(y[:, c], x, form) for c in cameras],
    }
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("rest", nargs="*", metavar="key=value")
    options = parser.parse_args()
    moments = Moments(PairIndex.read(options.index), options.root, compose(options.experiment, "stage2", options.rest))
    print(f"{int((~moments.test).sum())} moments train, {int(moments.test.sum())} test, {moments.y.shape[1]} cameras")
    forms = {
        "F(x): one linear layer, added to x": ({"kind": "linear", "residual": True}, 3e-3),
        "F(x): nine blocks, added to x": ({"kind": "resnet", "residual": True}, 1e-3),
        "F(x): nine blocks as a generator": ({"kind": "resnet", "residual": False}, 1e-3),
    }
    rows = [["KL of y to", *FORMS]]
    of_bars = [bars(moments, form) for form in FORMS]
    rows += [[name, *(f"{found[name]:.3f}" for found in of_bars)] for name in of_bars[0]]
    for title, (mapper, rate) in forms.items():
        found = [fit(moments, mapper, form, rate, seed=0) for form in FORMS]
        rows.append([title, *(f"{value:.3f} ({100 * change:.0f} %)" for value, change in found)])
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
