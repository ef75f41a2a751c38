"""A person as a figure on a transparent canvas, in any pose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from cge_fast.data.pedestrians.identities import PATTERNS, Colour, Head, Identity

WIDTH, HEIGHT, MARGIN = 48, 96, 4  # pixels of an image, and around it for the tilt of the camera to turn into view
SCENE = (WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN)
CANVAS = (2 * SCENE[0], 2 * SCENE[1])  # people and occluders are drawn at twice the size and reduced
SCALE, SHIFT, LEAN = (0.84, 1.16), (10.0, 16.0), 0.08  # shift: canvas pixels across and down, at most
ONLY_IN_FRONT = ("jacket", "logo")
Point = tuple[float, float]


@dataclass(frozen=True)
class Pose:
    front: bool
    stride: float  # -1 to 1: which leg is ahead, and how far
    swing: float  # -1 to 1: the same of the arms
    lean: float
    size: float  # canvas pixels of a person of height 1
    x: float  # canvas pixels of the middle of the body
    y: float


def random_pose(rng: np.random.Generator) -> Pose:
    stride, swing, lean = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(-LEAN, LEAN)
    x, y = (canvas / 2 + rng.uniform(-1, 1) * shift for canvas, shift in zip(CANVAS, SHIFT, strict=True))
    return Pose(rng.random() < 0.5, stride, swing, lean, 1.74 * HEIGHT * rng.uniform(*SCALE), x, y)


class Pen:
    """Draws on a transparent canvas in units of the body: x from its middle, y from the crown (0) to the soles (1)."""

    def __init__(self, person: Identity, pose: Pose):
        self.canvas = Image.new("RGBA", CANVAS)
        self.ink = ImageDraw.Draw(self.canvas)
        self.pose, self.across, self.down = pose, 0.88 * pose.size * person.width, pose.size * person.height

    def place(self, point: Point) -> Point:
        x, y = point[0], point[1] - 0.5
        return self.pose.x + self.across * x - self.pose.size * self.pose.lean * y, self.pose.y + self.down * y

    def polygon(self, points: list[Point], fill: Colour) -> None:
        self.ink.polygon([self.place(point) for point in points], fill)

    def trapezoid(self, x: float, top: float, bottom: float, upper: float, lower: float, fill: Colour) -> None:
        """Symmetric about x, with the half widths `upper` and `lower`."""
        self.polygon([(x - upper, top), (x + upper, top), (x + lower, bottom), (x - lower, bottom)], fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        (x, y), rx, ry = self.place((x, y)), self.across * rx, self.down * ry
        self.ink.ellipse((x - rx, y - ry, x + rx, y + ry), fill)

    def limb(self, joints: list[Point], radii: list[float], fill: Colour) -> None:
        """A tapering, rounded tube through the joints."""
        spots = [(*self.place(joint), self.across * radius) for joint, radius in zip(joints, radii, strict=True)]
        for x, y, r in spots:
            self.ink.ellipse((x - r, y - r, x + r, y + r), fill)
        for (x0, y0, r0), (x1, y1, r1) in pairwise(spots):
            length = math.hypot(x1 - x0, y1 - y0)
            nx, ny = (y0 - y1) / length, (x1 - x0) / length
            start, end = (x0 + r0 * nx, y0 + r0 * ny), (x1 + r1 * nx, y1 + r1 * ny)
            self.ink.polygon([start, end, (x1 - r1 * nx, y1 - r1 * ny), (x0 - r0 * nx, y0 - r0 * ny)], fill)


def toned(colour: Colour, tone: float, dye: Sequence[float] = (0, 0, 0)) -> Colour:
    return tuple(min(255, max(0, int(tone * (grey + more)))) for grey, more in zip(colour, dye, strict=True))


def draw_person(person: Identity, pose: Pose) -> Image.Image:
    """The person and the shadow on a transparent canvas (RGBA)."""
    pen = Pen(person, pose)
    pen.ellipse(0, 0.985, 0.24, 0.03, (0, 0, 0, 90))
    arm_behind = 1 if pose.swing < 0 else -1
    draw_legs(pen, person)
    draw_arm(pen, person, arm_behind, tone=0.72)
    draw_torso(pen, person)
    draw_arm(pen, person, -arm_behind, tone=0.86)
    draw_head(pen, person.head)
    draw_bag(pen, person)
    return pen.canvas


def draw_legs(pen: Pen, person: Identity) -> None:
    lower, stride = person.lower, abs(pen.pose.stride)
    leg_behind = 1 if pen.pose.stride < 0 else -1
    for side, tone, lift in ((leg_behind, 0.72, 0.06 * stride), (-leg_behind, 0.92, 0.0)):
        cloth, skin = toned(lower.colour, tone, person.dyes[1]), toned(person.head.skin, tone)
        shoe = toned(lower.shoes, tone)
        foot = side * (0.042 + 0.075 * stride)
        hip, knee, ankle = (side * 0.05, 0.5), (side * 0.028 + 0.5 * foot, 0.73 - 0.5 * lift), (foot, 0.95 - lift)
        pen.limb([hip, knee, ankle], [0.058, 0.045, 0.033], cloth if lower.kind == "trousers" else skin)
        if lower.kind == "shorts":
            pen.limb([hip, (knee[0], 0.68)], [0.06, 0.056], cloth)
        if lower.boots:
            pen.limb([(0.5 * (knee[0] + foot), 0.84 - lift), ankle], [0.046, 0.04], shoe)
        pen.limb([ankle, (foot + side * 0.025, 0.976 - lift)], [0.034, 0.034], shoe)
    hem = (0.7, 0.15 + 0.02 * stride) if lower.kind == "skirt" else (0.55, 0.1)
    pen.trapezoid(0, 0.46, hem[0], 0.105, hem[1], toned(lower.colour, 0.92, person.dyes[1]))


def wrist(pose: Pose, side: int) -> Point:
    """The arm that swings ahead bends inwards and up."""
    ahead = max(0.0, side * pose.swing)
    return side * (0.175 - 0.07 * ahead), 0.48 - 0.07 * ahead


def draw_arm(pen: Pen, person: Identity, side: int, tone: float) -> None:
    sleeve, skin = toned(person.upper.colour, tone, person.dyes[0]), toned(person.head.skin, tone)
    joints = [(side * 0.11, 0.2), (side * 0.155, 0.34), wrist(pen.pose, side)]
    pen.limb(joints, [0.036, 0.028, 0.026], skin)
    if person.upper.long_sleeves:
        pen.limb(joints, [0.042, 0.036, 0.029], sleeve)
        pen.ellipse(joints[2][0], joints[2][1] + 0.022, 0.024, 0.02, skin)
    else:
        pen.limb([joints[0], (side * 0.142, 0.29)], [0.042, 0.042], sleeve)


def torso(left: float, right: float, top: float, bottom: float) -> list[Point]:
    """The outline of a part of the torso, in the units of PATTERNS."""
    levels = np.linspace(top, bottom, 9)
    half_widths = np.interp(levels, (0, 0.06, 0.14, 0.35, 0.65, 1), (0.045, 0.1, 0.12, 0.118, 0.1, 0.112))
    right_edge = np.stack([right * half_widths, 0.15 + 0.36 * levels], axis=1)
    left_edge = np.stack([left * half_widths, 0.15 + 0.36 * levels], axis=1)
    return np.concatenate([right_edge, left_edge[::-1]]).tolist()


def draw_torso(pen: Pen, person: Identity) -> None:
    accent = toned(person.upper.accent, 1, person.dyes[0])
    pen.polygon(torso(-1, 1, 0, 1), toned(person.upper.colour, 1, person.dyes[0]))
    if pen.pose.front or person.upper.pattern not in ONLY_IN_FRONT:
        for patch in PATTERNS.get(person.upper.pattern, []):
            pen.polygon(torso(*patch), accent)


def draw_head(pen: Pen, head: Head) -> None:
    front, hair = pen.pose.front, toned(head.colour, 1)
    if head.hair == "long":
        for x in (-0.05, 0.05):
            pen.limb([(x, 0.07), (1.15 * x, 0.19)], [0.026, 0.02], toned(head.colour, 0.85))
    pen.limb([(0, 0.12), (0, 0.16)], [0.032, 0.036], toned(head.skin, 0.82))
    pen.ellipse(0, 0.075, 0.058, 0.073, head.skin)
    if front:
        for x in (-0.022, 0.022):
            pen.ellipse(x, 0.076, 0.009, 0.006, (30, 24, 24))
        pen.ellipse(0, 0.116, 0.017, 0.005, toned(head.skin, 0.6))
    angles = np.linspace(0, math.pi, 12)
    crown = np.stack([0.063 * np.cos(angles), 0.064 - 0.07 * np.sin(angles)], axis=1).tolist()
    if head.hair == "cap":
        pen.polygon(crown, hair)
        pen.ellipse(0, 0.062, 0.07 if front else 0.05, 0.012, toned(head.colour, 0.7))
    elif head.hair != "bald" and front:
        pen.polygon([*crown, (-0.035, 0.042), (0.035, 0.042)], hair)
    elif head.hair != "bald":
        pen.ellipse(0, 0.07, 0.063, 0.074, hair)
        if head.hair == "long":
            pen.limb([(0, 0.08), (0, 0.21)], [0.064, 0.055], toned(head.colour, 0.94))


def draw_bag(pen: Pen, person: Identity) -> None:
    front, colour, dark = pen.pose.front, person.bag_colour, toned(person.bag_colour, 0.78)
    side = -1 if front else 1  # carried at the right
    match person.bag:
        case "backpack" if front:
            for left in (-0.62, 0.46):
                pen.polygon(torso(left, left + 0.16, 0.04, 0.5), dark)
        case "backpack":
            pen.limb([(0, 0.24), (0, 0.39)], [0.075, 0.088], colour)
            pen.trapezoid(0, 0.35, 0.43, 0.06, 0.06, dark)
        case "shoulder":
            pen.limb([(-side * 0.08, 0.17), (side * 0.11, 0.45)], [0.011, 0.011], dark)
            pen.trapezoid(side * 0.13, 0.44, 0.55, 0.055, 0.062, colour)
        case "hand":
            x, y = wrist(pen.pose, side)
            pen.limb([(x - 0.03, y + 0.08), (x, y + 0.02), (x + 0.03, y + 0.08)], [0.008] * 3, dark)
            pen.trapezoid(x, y + 0.07, y + 0.2, 0.055, 0.068, colour)
