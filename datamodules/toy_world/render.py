"""Cameras and drawing: render a simulated take as RGB frames.

Convex primitives in painter's order, drawn with Pillow at twice the size and averaged down; geometry is projected for
the whole take at once with NumPy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from datamodules.toy_world.scene import COLOURS, HANDS, Array, Take

NEAR_M = 0.05
LIGHT = np.array([0.35, -0.45, 0.82])
SHOULDER = {"left": (-0.34, -0.20, 0.08), "right": (0.34, -0.20, 0.08)}
EXO_CAMERAS = {  # position, looked-at point
    "cam01": ((0.0, 1.25, 0.62), (0.0, 0.24, 0.06)),
    "cam02": ((-0.72, 1.10, 0.66), (0.0, 0.24, 0.06)),
    "cam03": ((0.72, 1.10, 0.66), (0.0, 0.24, 0.06)),
    "cam04": ((0.0, 0.86, 1.05), (0.0, 0.22, 0.02)),
}


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: position and axes float [T, 3] each, field of view in degrees, image size in pixels.

    Each frame is the mean of the latest ``exposure`` ones.
    """

    position: Array
    forward: Array
    up: Array
    fov_deg: float
    width: int
    height: int
    exposure: int = 1


@dataclass(frozen=True)
class _Primitive:
    vertices: Array  # [T, V, 3]
    faces: tuple[tuple[int, ...], ...]
    colours: tuple[tuple[int, int, int], ...]
    ground: bool = False


def ego_camera(take: Take, size: int) -> Camera:
    """Return the camera of C's glasses: it follows the gaze and shakes (Ornstein-Uhlenbeck in position, gaze, roll)."""
    rng = np.random.default_rng([take.seed, 1])
    frames, amplitude = take.num_frames, take.world.shake
    position = np.array([0.0, -0.20, 0.50]) + 0.012 * amplitude * _wander(rng, frames, 3)
    target = take.gaze * np.array([0.8, 1.0, 0.6]) + 0.02 * amplitude * _wander(rng, frames, 3)
    roll = 0.035 * amplitude * _wander(rng, frames, 1)
    up = np.concatenate([np.sin(roll), np.zeros_like(roll), np.cos(roll)], axis=1)
    world = take.world
    return Camera(position, _unit(target - position), up, world.ego_fov_deg, size, size, world.exposure)


def exo_camera(take: Take, name: str, width: int, height: int) -> Camera:
    """Return a tripod camera of ``EXO_CAMERAS``, displaced by a few centimetres in each take."""
    rng = np.random.default_rng([take.seed, 2, int(name[-2:])])
    (position, target), fov = EXO_CAMERAS[name], take.world.exo_fov_deg
    at = np.array(position) + rng.uniform(-0.06, 0.06, 3)
    frames = take.num_frames
    forward = _unit(np.array(target) + rng.uniform(-0.02, 0.02, 3) - at)
    up = np.array([0.0, 0.0, 1.0])
    return Camera(np.tile(at, (frames, 1)), np.tile(forward, (frames, 1)), np.tile(up, (frames, 1)), fov, width, height)


def render(take: Take, camera: Camera, wearer: bool, counter: bool = False) -> Iterator[NDArray[np.uint8]]:
    """Render the frames of one camera.

    Args:
        take: the simulated take.
        camera: the camera.
        wearer: draw C's head and body (exocentric views).
        counter: paint the frame number as eight black or white blocks along the upper edge, lowest bit left.

    Yields:
        uint8 [height, width, 3], RGB.
    """
    # Project every shape for the whole take at once.
    shapes = _scene(take, wearer)
    right = _unit(np.cross(camera.forward, camera.up))
    axes = np.stack([right, np.cross(right, camera.forward), camera.forward], axis=1)  # [T, 3, 3]
    drawn = [_project(shape, axes, camera) for shape in shapes]
    # Painter's order: the farthest shape first.
    order = np.argsort([-distance for _, _, distance in drawn], axis=0, kind="stable").T.tolist()  # [T, shapes]
    background = _rgb(take.look["wall"], take.look["light"][0])
    exposed: deque[Image.Image] = deque(maxlen=camera.exposure)
    for t in range(take.num_frames):
        image = Image.new("RGB", (2 * camera.width, 2 * camera.height), background)
        draw = ImageDraw.Draw(image)
        for index in order[t]:
            outlines, facing, _ = drawn[index]
            for outline, colour, visible in zip(outlines, shapes[index].colours, facing[t], strict=True):
                if visible:
                    draw.polygon(outline[t], fill=colour)
        exposed.append(image)
        if len(exposed) > 1:
            mean = np.mean([np.asarray(each) for each in exposed], axis=0)
            image = Image.fromarray(mean.round().astype(np.uint8))
            draw = ImageDraw.Draw(image)
        if counter:
            block = camera.width // 4
            for bit in range(8):
                shade = 255 * (t >> bit & 1)
                draw.rectangle((bit * block, 0, (bit + 1) * block - 1, block - 1), fill=(shade, shade, shade))
        yield np.asarray(image.reduce(2))


def _project(shape: _Primitive, axes: Array, camera: Camera) -> tuple[list[Any], Any, Array]:
    """Project one shape.

    Returns:
        Outlines [faces][T] as x, y, x, y, ...; a flag [T][faces] for faces that are in front of the camera and face it;
        distance [T] in metres.
    """
    focal = camera.width / np.tan(np.radians(camera.fov_deg) / 2)  # in pixels, at twice the image size
    seen = np.einsum("tij,tvj->tvi", axes, shape.vertices - camera.position[:, None])
    depth = np.maximum(seen[..., 2], 1e-6)
    u, v = camera.width + focal * seen[..., 0] / depth, camera.height - focal * seen[..., 1] / depth
    a, b, c = (np.array([face[k] for face in shape.faces]) for k in range(3))
    clockwise = (u[:, b] - u[:, a]) * (v[:, c] - v[:, a]) < (v[:, b] - v[:, a]) * (u[:, c] - u[:, a])
    before = np.stack([seen[:, list(face), 2].min(axis=1) >= NEAR_M for face in shape.faces], axis=1)
    distance = np.linalg.norm(seen.mean(axis=1), axis=-1) + (100.0 if shape.ground else 0.0)
    uv = np.stack([u, v], axis=-1)
    outlines = [uv[:, list(face)].reshape(len(uv), -1).tolist() for face in shape.faces]
    return outlines, (clockwise & before).tolist(), distance


def _unit(vector: Array) -> Array:
    return np.asarray(vector / np.linalg.norm(vector, axis=-1, keepdims=True))


def _wander(rng: np.random.Generator, frames: int, dims: int) -> Array:
    """Return Ornstein-Uhlenbeck paths of unit variance, float [frames, dims]."""
    noise = rng.standard_normal((frames, dims))
    path = noise.copy()
    for t in range(1, frames):
        path[t] = 0.8 * path[t - 1] + 0.6 * noise[t]
    return path


def _rgb(colour: tuple[float, ...], gain: float) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, int(c * gain))) for c in colour)
    return r, g, b


def _scene(take: Take, wearer: bool) -> list[_Primitive]:
    frames, gain, look = take.num_frames, take.look["light"][0], take.look
    hand, shapes = take.world.hand_scale, []

    def add(
        local: Array, faces: list[tuple[int, ...]], at: Array, colour: tuple[float, ...], ground: bool = False
    ) -> None:
        vertices = np.broadcast_to(at[:, None] + local, (frames, len(local), 3)) if local.ndim == 2 else local
        a, b, c = (vertices[0][[face[k] for face in faces]] for k in range(3))
        bright = 0.72 + 0.28 * _unit(np.cross(b - a, c - a)) @ LIGHT
        shades = tuple(_rgb(colour, gain * value) for value in bright.tolist())
        shapes.append(_Primitive(np.asarray(vertices), tuple(faces), shades, ground))

    # The table: tiles in two tones, drawn before everything else.
    origin = np.zeros((frames, 3))
    xs, ys = np.linspace(-0.62, 0.62, 5), np.linspace(0.0, 0.74, 4)
    for i in range(4):
        for j in range(3):
            tile = np.array(
                [(xs[i], ys[j], 0), (xs[i + 1], ys[j], 0), (xs[i + 1], ys[j + 1], 0), (xs[i], ys[j + 1], 0)]
            )
            tone = tuple(c * (1.0 if (i + j) % 2 else 0.9) for c in look["table"])
            add(tile, [(0, 1, 2, 3)], origin, tone, ground=True)
    # The objects.
    for index, thing in enumerate(take.things):
        colour = tuple(float(c) for c in COLOURS[thing.colour])
        for local, faces in _solid(thing.kind, 1.3 * take.world.object_scale):
            add(local, faces, take.positions[:, index], colour)
    # Hands with thumbs, and arms.
    for name in HANDS:
        palm = take.hands[name] + np.array([0.0, -0.055, 0.065])
        local, faces = _box(0.085 * hand, 0.10 * hand, 0.05 * hand)
        add(local, faces, palm, look["skin"])
        side = 0.05 if name == "left" else -0.05
        thumb, thumb_faces = _box(0.02 * hand, 0.06 * hand, 0.026 * hand)
        add(thumb + hand * np.array([side, 0.05, -0.012]), thumb_faces, palm, look["skin"])
        arm, arm_faces = _prism(
            np.tile(np.array(SHOULDER[name]), (frames, 1)), palm + np.array([0.0, -0.06, 0.0]), 0.03 * hand
        )
        add(arm, arm_faces, origin, look["sleeve"])
    # Body and head, for the exocentric cameras.
    if wearer:
        local, faces = _box(0.36, 0.16, 0.42)
        add(local + np.array([0.0, -0.36, 0.0]), faces, origin, tuple(0.6 * c + 80.0 for c in look["sleeve"]))
        local, faces = _sphere(0.115)
        add(local + np.array([0.0, -0.33, 0.40]), faces, origin, look["skin"])
    return shapes


def _box(width: float, depth: float, height: float) -> tuple[Array, list[tuple[int, ...]]]:
    x, y, z = width / 2, depth / 2, height / 2
    corners = np.array([(sx * x, sy * y, sz * z) for sz, sy, sx in product((-1, 1), repeat=3)])
    return corners, [(0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5)]


def _frustum(bottom: float, top: float, z0: float, z1: float, sides: int = 8) -> tuple[Array, list[tuple[int, ...]]]:
    angle = 2 * np.pi * np.arange(sides) / sides
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    low = np.concatenate([bottom * ring, np.full((sides, 1), z0)], axis=1)
    high = np.concatenate([top * ring, np.full((sides, 1), z1)], axis=1)
    walls = [(i, (i + 1) % sides, sides + (i + 1) % sides, sides + i) for i in range(sides)]
    return np.concatenate([low, high]), [*walls, tuple(range(sides, 2 * sides)), tuple(range(sides - 1, -1, -1))]


def _sphere(radius: float, sides: int = 7, rings: int = 4) -> tuple[Array, list[tuple[int, ...]]]:
    angle = 2 * np.pi * np.arange(sides) / sides
    points = [(0.0, 0.0, -radius)]
    for k in range(1, rings):
        latitude = np.pi * (k / rings - 0.5)
        points += [
            (radius * np.cos(latitude) * np.cos(a), radius * np.cos(latitude) * np.sin(a), radius * np.sin(latitude))
            for a in angle
        ]
    points.append((0.0, 0.0, radius))
    faces: list[tuple[int, ...]] = [(0, 1 + (i + 1) % sides, 1 + i) for i in range(sides)]
    for k in range(rings - 2):
        a, b = 1 + k * sides, 1 + (k + 1) * sides
        faces += [(a + i, a + (i + 1) % sides, b + (i + 1) % sides, b + i) for i in range(sides)]
    last = 1 + (rings - 2) * sides
    faces += [(last + i, last + (i + 1) % sides, len(points) - 1) for i in range(sides)]
    return np.array(points), faces


def _prism(start: Array, end: Array, thickness: float) -> tuple[Array, list[tuple[int, ...]]]:
    """Return the vertices, float [T, 8, 3], and the faces of a square rod between two moving points."""
    along = _unit(end - start)
    side = _unit(np.cross(along, np.array([0.0, 0.0, 1.0]))) * thickness
    lift = np.cross(side, along)
    corners = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ends = [point + sy * side + sz * lift for point, (sy, sz) in product((start, end), corners)]
    faces: list[tuple[int, ...]] = [(0, 1, 2, 3), (7, 6, 5, 4), (1, 0, 4, 5), (2, 1, 5, 6), (3, 2, 6, 7), (0, 3, 7, 4)]
    return np.stack(ends, axis=1), faces


def _solid(kind: str, scale: float) -> list[tuple[Array, list[tuple[int, ...]]]]:
    """Return vertices and faces of the convex parts of an object standing on z = 0."""
    s = scale
    if kind == "ball":
        local, faces = _sphere(0.065 * s)
        return [(local + np.array([0, 0, 0.065 * s]), faces)]
    if kind == "box":
        local, faces = _box(0.17 * s, 0.15 * s, 0.15 * s)
        return [(local + np.array([0, 0, 0.075 * s]), faces)]
    if kind == "cone":
        return [_frustum(0.085 * s, 0.004 * s, 0.0, 0.19 * s)]
    if kind == "bottle":
        return [_frustum(0.045 * s, 0.045 * s, 0.0, 0.19 * s), _frustum(0.02 * s, 0.02 * s, 0.19 * s, 0.34 * s, 6)]
    if kind == "plate":
        return [_frustum(0.10 * s, 0.17 * s, 0.0, 0.03 * s, 10)]
    if kind == "cup":
        return [_frustum(0.05 * s, 0.07 * s, 0.0, 0.14 * s)]
    if kind == "bowl":
        return [_frustum(0.05 * s, 0.12 * s, 0.0, 0.08 * s, 10)]
    if kind == "pyramid":
        return [_frustum(0.12 * s, 0.004 * s, 0.0, 0.16 * s, 4)]
    parts = []
    for i in range(8):
        angle = 2 * np.pi * i / 8
        local, faces = _box(0.04 * s, 0.04 * s, 0.04 * s)
        parts.append((local + np.array([0.09 * s * np.cos(angle), 0, 0.11 * s + 0.09 * s * np.sin(angle)]), faces))
    return parts
