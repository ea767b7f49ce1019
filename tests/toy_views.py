"""Measure how well the generated world's views show each factor: ``python tests/toy_views.py fair faint``.

A network of one hidden layer reads verb, object, colour and hand of an action from the four frames of a clip, 48 pixels
wide, as the default model sees them. It reads either whole frames, shrunk to 24 pixels, or an oracle's crops of these
frames: windows of 16 pixels that follow the used object, and of 24 pixels that stay where it was first. The second
reading is better by all that the frames contain and a reader that does not know where to look does not find.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datamodules.toy_world.render import Camera, ego_camera, exo_camera, render
from datamodules.toy_world.scene import COLOURS, HANDS, KINDS, PRESETS, VERBS, Action, Take, World, simulate
from lightning_modules.validation.report import markdown_table

FACTORS = {"verb": VERBS, "object": KINDS, "colour": tuple(COLOURS), "hand": HANDS}
VIEWS = {"cam01": "best exocentric", "ego": "egocentric"}
FRAMES, STORED, SEEN, READ = 4, 64, 48, 24
CLIP_SHARE = 0.66


@dataclass
class Clips:
    """Clips of one view: inputs of the reader, float [clips, D], and the value of each factor, int64 [clips, 4]."""

    whole: Tensor
    crops: Tensor
    factors: Tensor


def image_position(camera: Camera, point: np.ndarray) -> np.ndarray:
    """Project points to right and down from the centre in half image sides, NaN behind the camera; float [T, 2]."""
    right = np.cross(camera.forward, camera.up)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    up = np.cross(right, camera.forward)
    x, y, depth = (((point - camera.position) * axis).sum(axis=1) for axis in (right, up, camera.forward))
    reach = np.tan(np.radians(camera.fov_deg) / 2) * np.where(depth > 0, depth, np.nan)
    return np.stack([x / reach, -y / reach * camera.width / camera.height], axis=1)


def clip_frames(take: Take, action: Action) -> np.ndarray:
    """Return the numbers of the frames that the model sees of an action."""
    half_s = 0.5 * CLIP_SHARE * (action.end_s - action.start_s)
    times_s = action.time_s - half_s + 2 * half_s * (np.arange(FRAMES) + 0.5) / FRAMES
    return np.clip(times_s * take.world.fps, 0, take.num_frames - 1).astype(int)


def camera_of(take: Take, view: str) -> Camera:
    """Return the glasses' camera, or an exocentric one of the released width."""
    return ego_camera(take, STORED) if view == "ego" else exo_camera(take, view, STORED * 4 // 3 // 2 * 2, STORED)


def read_clips(world: World, seeds: range, view: str) -> Clips:
    """Render takes from one view and cut their actions."""
    whole, crops, factors = [], [], []
    for seed in seeds:
        take = simulate(seed, world)
        camera = camera_of(take, view)
        left = (camera.width - STORED) // 2
        frames = np.stack(list(render(take, camera, wearer=view != "ego")))[:, :, left : left + STORED]
        for action in take.actions:
            chosen = clip_frames(take, action)
            seen = [
                Image.fromarray(frames[number]).resize((SEEN, SEEN), Image.Resampling.BILINEAR) for number in chosen
            ]
            at = image_position(camera, take.positions[:, action.thing] + np.array([0.0, 0.0, 0.08]))[chosen]
            places = SEEN / 2 * (1 + at * np.array([camera.width / STORED, 1.0]))
            whole.append(_pixels([frame.resize((READ, READ), Image.Resampling.BOX) for frame in seen]))
            moving = [_window(frame, place, 8) for frame, place in zip(seen, places, strict=True)]
            crops.append(torch.cat([_pixels(moving), _pixels([_window(frame, places[0], 12) for frame in seen])]))
            thing = take.things[action.thing]
            values = (action.verb, thing.kind, thing.colour, action.hand)
            factors.append([names.index(value) for names, value in zip(FACTORS.values(), values, strict=True)])
    return Clips(torch.stack(whole), torch.stack(crops), torch.tensor(factors))


def _window(frame: Image.Image, place: np.ndarray, half: int) -> Image.Image:
    x, y = place
    box = (x - half, y - half, x + half, y + half)
    return frame.transform((READ, READ), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)


def _pixels(frames: list[Image.Image]) -> Tensor:
    """Return frames and their differences, float [D]."""
    pixels = torch.stack([torch.from_numpy(np.asarray(frame).copy()) for frame in frames]).float() / 255
    return torch.cat([pixels, pixels.diff(dim=0)]).flatten()


def accuracies(train: Tensor, train_factors: Tensor, tested: Tensor, factors: Tensor, epochs: int = 15) -> list[float]:
    """Train the reader, and return its accuracy for each factor on other clips."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation = train.mean(0), train.std(0) + 0.05
    train, tested = (train - mean) / deviation, (tested - mean) / deviation
    sizes = [len(names) for names in FACTORS.values()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Linear(train.shape[1], 192), nn.ReLU(), nn.Dropout(0.3), nn.Linear(192, sum(sizes)))
        reader = nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(reader.parameters(), 1e-3, weight_decay=0.1)
        for _ in range(epochs):
            for rows in torch.randperm(len(train), generator=generator).split(64):
                outputs = reader(train[rows]).split(sizes, dim=1)
                losses = [F.cross_entropy(out, train_factors[rows, k]) for k, out in enumerate(outputs)]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()
    reader.eval()
    with torch.no_grad():
        outputs = reader(tested).split(sizes, dim=1)
    return [float((out.argmax(1) == factors[:, k]).float().mean()) for k, out in enumerate(outputs)]


def measure(world: World, takes: int, tested: int) -> dict[str, dict[str, list[float]]]:
    """Return the accuracy of each factor by view and input: ``whole``, ``crops``, or ``frequent``, which reads none."""
    found: dict[str, dict[str, list[float]]] = {}
    for view in VIEWS:
        train, test = read_clips(world, range(takes), view), read_clips(world, range(100_000, 100_000 + tested), view)
        found[view] = {
            name: accuracies(getattr(train, name), train.factors, getattr(test, name), test.factors)
            for name in ("whole", "crops")
        }
        frequent = train.factors.mode(0).values
        found[view]["frequent"] = (test.factors == frequent).float().mean(0).tolist()
    return found


def main() -> None:
    """Print a table of some presets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", choices=PRESETS)
    parser.add_argument("--takes", type=int, default=160, help="takes that the reader learns from")
    parser.add_argument("--tested", type=int, default=50, help="takes that it is tested on")
    options = parser.parse_args()
    rows = [["preset", "view", "read from", *FACTORS]]
    names = {"frequent": "most frequent value", "whole": "whole frames", "crops": "an oracle's crops"}
    for preset in options.presets:
        found = measure(PRESETS[preset], options.takes, options.tested)
        for view, title in VIEWS.items():
            for name in names:
                cells = [f"{100 * value:.0f}" for value in found[view][name]]
                rows.append([preset, title, names[name], *cells])
    print(markdown_table(rows, left=3))


if __name__ == "__main__":
    main()
