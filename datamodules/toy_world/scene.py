"""The simulated table-top world: actions on objects, and the position of everything at each frame.

Metres; the camera wearer C sits at y < 0 and looks along +y at a table whose top is z = 0. A take is a function of its
seed alone. Left and right are always C's own, so an exocentric camera in front of the table sees them mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

KINDS = ("bottle", "plate", "ball", "box", "cone", "ring", "cup", "bowl", "pyramid")
COLOURS = {
    "red": (214, 38, 38),
    "green": (40, 168, 62),
    "blue": (40, 84, 220),
    "yellow": (240, 206, 40),
    "white": (244, 244, 244),
    "purple": (148, 52, 190),
    "orange": (244, 128, 30),
    "black": (34, 34, 38),
    "pink": (244, 140, 190),
}
VERBS = ("picks up", "puts down", "shakes", "taps", "pushes", "pulls")
HANDS = ("left", "right")

LIFT_M = 0.24
SLIDE_M = 0.26
SHAKE_M = 0.13
TAP_M = 0.20
NEAR_Y, FAR_Y = 0.16, 0.44
_USUAL = 6  # kinds and colours that the files of every world name, whether they occur or not
PHRASINGS = (
    "C {verb} the {thing} with the {hand} hand.",
    "With the {hand} hand, C {verb} the {thing}.",
    "C uses the {hand} hand and {verb} the {thing}.",
    "The {hand} hand of C {verb} the {thing} on the table.",
)
"""Forms of a narration; worlds without phrasings have the first alone."""
REST = {"left": (-0.30, 0.02, 0.03), "right": (0.30, 0.02, 0.03)}


@dataclass(frozen=True)
class World:
    """A preset of the world.

    Attributes:
        kinds, colours: number of ``KINDS`` and ``COLOURS`` that occur.
        objects: fewest and most objects on the table of one take, all of different kind and colour.
        actions: narrated actions of one take.
        action_s: shortest and longest mean duration of an action, drawn once per take.
        fps: frames per second of every camera.
        ego_fov_deg: field of view of the egocentric camera.
        shake: amplitude of the egocentric camera's shake relative to the default.
        exposure: frames that each egocentric frame is the mean of, the latest ones, which blurs what moves.
        glance: probability that C looks away during an action.
        gaze_follow: how far C's gaze follows the used object: 1 keeps it in the middle of the frame, 0 keeps the middle
            of the table there.
        object_scale: size of the objects.
        hand_scale: size of hands and arms.
        exo_fov_deg: field of view of the exocentric cameras.
        exo_cameras: probabilities of two, three and four exocentric cameras around a take.
        best_exo: the camera annotated as best; None draws one for each take.
        phrasings: narrations and questions come in several forms, for language models that know English.
    """

    kinds: int = 4
    colours: int = 5
    objects: tuple[int, int] = (1, 2)
    actions: int = 6
    action_s: tuple[float, float] = (1.0, 1.3)
    fps: int = 8
    ego_fov_deg: float = 62.0
    shake: float = 1.0
    exposure: int = 1
    glance: float = 0.05
    gaze_follow: float = 1.0
    object_scale: float = 1.0
    hand_scale: float = 1.0
    exo_fov_deg: float = 54.0
    exo_cameras: tuple[float, float, float] = (0.7, 0.2, 0.1)
    best_exo: str | None = None
    phrasings: bool = False

    @property
    def named_kinds(self) -> tuple[str, ...]:
        """Kinds of objects that class lists and the vocabulary have."""
        return KINDS[: max(_USUAL, self.kinds)]

    @property
    def named_colours(self) -> tuple[str, ...]:
        """Colours that class lists and the vocabulary have."""
        return tuple(COLOURS)[: max(_USUAL, self.colours)]


PRESETS = {
    "easy": World(),
    "hard": World(kinds=6, colours=6, objects=(3, 4), ego_fov_deg=58.0, shake=1.6, glance=0.25, object_scale=0.75),
    # The exocentric cameras see more than C's glasses, so that there is something to learn from them.
    "fair": World(
        ego_fov_deg=55.0,
        shake=2.0,
        glance=0.30,
        hand_scale=1.5,
        exo_fov_deg=42.0,
        exo_cameras=(0.0, 0.0, 1.0),
        best_exo="cam01",
    ),
    # For pretrained language models: more to name, in more words. Render it with --size 224 for pretrained encoders.
    "rich": World(kinds=9, colours=9, objects=(2, 3), phrasings=True),
    # The glasses see all that the exocentric cameras see, but small, off the middle and blurred: what these teach can
    # be read from egocentric video alone.
    "faint": World(
        ego_fov_deg=95.0,
        shake=2.0,
        exposure=2,
        glance=0.0,
        gaze_follow=0.3,
        exo_fov_deg=42.0,
        exo_cameras=(0.0, 0.0, 1.0),
        best_exo="cam01",
    ),
}


@dataclass(frozen=True)
class Thing:
    """An object on the table."""

    kind: str
    colour: str

    @property
    def phrase(self) -> str:
        """Colour and kind, as in the narrations."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Action:
    """One narrated action: ``verb`` on ``things[thing]`` with ``hand`` during [start_s, end_s)."""

    verb: str
    thing: int
    hand: str
    start_s: float
    end_s: float
    ego_visible: bool

    @property
    def time_s(self) -> float:
        """Timestamp of the narration in seconds."""
        return 0.5 * (self.start_s + self.end_s)


@dataclass
class Take:
    """A simulated recording: geometry of every frame, before any camera looks at it.

    Attributes:
        positions: float [T, objects, 3], metres.
        hands: ``left`` and ``right`` to float [T, 3], the palm.
        gaze: float [T, 3], the point C looks at.
        look: nuisance colours and light of this take.
    """

    seed: int
    world: World
    things: list[Thing]
    actions: list[Action]
    positions: Array
    hands: dict[str, Array]
    gaze: Array
    look: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def num_frames(self) -> int:
        """Number of frames of every camera of the take."""
        return len(self.gaze)

    def narration(self, action: Action) -> str:
        """Return the sentence an annotator would write, with ``C`` for the wearer as in Ego-Exo4D."""
        phrasing = (self.seed + self.actions.index(action)) % len(PHRASINGS) if self.world.phrasings else 0
        return sentence(action.verb, self.things[action.thing], action.hand, phrasing)


def sentence(verb: str, thing: Thing, hand: str, phrasing: int = 0) -> str:
    """Return the narration of one action in one of the ``PHRASINGS``."""
    return PHRASINGS[phrasing].format(verb=verb, thing=thing.phrase, hand=hand)


def smoothstep(u: Array | float) -> Array:
    """Return the cubic ease from 0 to 1 for u in [0, 1], constant outside."""
    u = np.clip(u, 0.0, 1.0)
    return np.asarray(u * u * (3.0 - 2.0 * u))


def simulate(seed: int, world: World, actions: int | None = None) -> Take:
    """Simulate one take.

    Args:
        seed: the take's only source of randomness.
        world: preset.
        actions: overrides ``world.actions``.
    """
    rng = np.random.default_rng(seed)
    # Objects of different kind and colour, spread over the table.
    objects = int(rng.integers(world.objects[0], world.objects[1] + 1))
    kinds, colours = rng.permutation(world.kinds)[:objects], rng.permutation(world.colours)[:objects]
    names = list(COLOURS)
    things = [Thing(KINDS[k], names[c]) for k, c in zip(kinds, colours, strict=True)]
    slots = np.linspace(-0.13, 0.13, objects) * (objects - 1) + rng.uniform(-0.04, 0.04, objects)
    at = np.stack([slots, rng.uniform(NEAR_Y, FAR_Y, objects), np.zeros(objects)], axis=1)

    # Everything rests in its place until an action moves it.
    count = world.actions if actions is None else actions
    slot_s = rng.uniform(*world.action_s)
    frames = round(count * slot_s * world.fps) + world.fps // 2
    positions = np.repeat(at[None], frames, axis=0)
    hands = {name: np.repeat(np.array([REST[name]], dtype=float), frames, axis=0) for name in HANDS}
    gaze_target = np.repeat(at.mean(axis=0)[None], frames, axis=0)
    done: list[Action] = []
    held: tuple[int, str] | None = None
    time_s = 0.0
    for _ in range(count):
        duration_s = slot_s * rng.uniform(0.9, 1.1)
        start, end = round(time_s * world.fps), min(round((time_s + duration_s) * world.fps), frames)
        # A held object can only be put down or shaken.
        if held is not None:
            thing, hand = held
            verb = str(rng.choice(["puts down", "shakes"], p=[0.6, 0.4]))
        else:
            thing, hand = int(rng.integers(objects)), str(rng.choice(HANDS))
            slide = "pushes" if at[thing, 1] < 0.5 * (NEAR_Y + FAR_Y) else "pulls"
            verb = str(rng.choice(["picks up", "taps", slide], p=[0.38, 0.22, 0.40]))
        was_held = held is not None
        held = (thing, hand) if verb in ("picks up", "shakes") else None
        # Move object and hand during the action, and leave them where they end.
        u = (np.arange(start, end) + 0.5 - start) / max(end - start, 1)
        path, hand_path = _motion(verb, u, at[thing], np.array(REST[hand]), was_held, held is not None)
        positions[start:end, thing] = path
        hands[hand][start:end] = hand_path
        at[thing] = path[-1] if verb == "shakes" else _end_position(verb, at[thing])
        positions[end:, thing] = at[thing]
        if held is not None:
            hands[hand][end:] = at[thing]
        else:
            hands[hand][end:] = REST[hand]
        # C looks at the object, or glances away and misses the action.
        glance = rng.random() < world.glance
        middle, follow = at.mean(axis=0), world.gaze_follow
        followed = path if follow == 1 else middle + follow * (path - middle)
        gaze_target[start:end] = (rng.choice([-0.9, 0.9]), 1.0, 0.35) if glance else followed
        gaze_target[end:] = at.mean(axis=0)
        done.append(Action(verb, thing, hand, time_s, time_s + duration_s, ego_visible=not glance))
        time_s += duration_s
    return Take(seed, world, things, done, positions, hands, _follow(gaze_target, world.fps), _look(rng))


def _end_position(verb: str, at: Array) -> Array:
    end = at.copy()
    if verb == "picks up":
        end[2] = LIFT_M
    elif verb == "puts down":
        end[2] = 0.0
    elif verb == "pushes":
        end[1] += SLIDE_M
    elif verb == "pulls":
        end[1] -= SLIDE_M
    return end


def _motion(verb: str, u: Array, at: Array, rest: Array, was_held: bool, stays_held: bool) -> tuple[Array, Array]:
    """Return the paths of object and palm, float [T, 3] each, during one action.

    The hand reaches until u = 0.2, acts until 0.8, and then draws back unless the object stays held.
    """
    act = smoothstep((u - 0.2) / 0.6)[:, None]
    path = at + act * (_end_position(verb, at) - at)
    palm = path.copy()
    swing = np.clip((u - 0.2) / 0.6, 0.0, 1.0)
    if verb == "shakes":
        path[:, 0] += SHAKE_M * np.sin(4.0 * np.pi * swing)
        palm = path.copy()
        path[-1] = at
    elif verb == "taps":
        palm[:, 2] += 0.04 + TAP_M * (0.5 + 0.5 * np.sin(4.0 * np.pi * swing))
    if not was_held:
        reach = smoothstep(u / 0.2)[:, None]
        palm = rest + reach * (palm - rest)
    if not stays_held:
        back = smoothstep((u - 0.8) / 0.2)[:, None]
        palm = palm + back * (rest - palm)
    return path, palm


def _follow(target: Array, fps: int) -> Array:
    """Return the gaze: the target after a first-order low pass of a quarter of a second."""
    keep = np.exp(-1.0 / (0.25 * fps))
    gaze = target.copy()
    for t in range(1, len(gaze)):
        gaze[t] = keep * gaze[t - 1] + (1.0 - keep) * target[t]
    return gaze


def _look(rng: np.random.Generator) -> dict[str, tuple[float, ...]]:
    tables = ((120, 84, 56), (92, 92, 100), (70, 60, 56), (140, 110, 84))
    walls = ((176, 182, 188), (150, 160, 150), (188, 176, 160), (130, 136, 150))
    sleeves = ((40, 44, 60), (52, 62, 66), (60, 48, 64), (34, 34, 38))
    skins = ((246, 190, 150), (226, 160, 120), (200, 136, 98))
    draw = {"table": tables, "wall": walls, "sleeve": sleeves, "skin": skins}
    look = {name: tuple(float(c) for c in options[rng.integers(len(options))]) for name, options in draw.items()}
    look["light"] = (float(rng.uniform(0.9, 1.08)),)
    return look
