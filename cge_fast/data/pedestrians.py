"""Drawn pedestrians: a seeded person re-identification set in the layout of Market-1501.

A person is a distinct combination of an upper body, a lower body and a head that many others share, so no single region
identifies anybody. In the trap split the training identities have upper bodies of their own and the test identities
share a few: a feature that looked at nothing else in training has little left at test time.
"""

import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from cge_fast.data.market1501 import SPLITS
from cge_fast.data.whole_folder import whole_folder

WIDTH, HEIGHT, MARGIN = 48, 96, 4  # pixels of an image, and around it for the tilt of the camera to turn into view
SCENE = (WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN)
CANVAS = (2 * SCENE[0], 2 * SCENE[1])  # people and occluders are drawn at twice the size and reduced
CAMERAS, CAMERAS_OF_AN_IDENTITY = 6, (3, 5)

# The difficulty of the set is in these constants and in how much the colours below differ.
UPPERS, LOWERS, HEADS = 30, 30, 24  # templates shared by all identities
TRAP_TEST_UPPERS = 6  # upper bodies shared by the test identities of the trap split
DYE = 3.0  # standard deviation of a person's own shade of a garment, in grey levels
BYSTANDER, OCCLUDER = 0.25, 0.30  # probabilities
OCCLUDERS = (  # share of each, then ranges of left, right, top and bottom as fractions of the canvas
    (0.4, (-0.3, 0.2), (0.8, 1.3), (0.58, 0.72), (1.1, 1.1)),
    (0.2, (-0.3, 0.2), (0.8, 1.3), (0.32, 0.42), (0.60, 0.72)),
    (0.2, (-0.3, 0.2), (0.8, 1.3), (-0.1, -0.1), (0.24, 0.40)),
    (0.1, (-0.1, -0.1), (0.34, 0.48), (-0.1, -0.1), (1.1, 1.1)),
    (0.1, (0.52, 0.66), (1.1, 1.1), (-0.1, -0.1), (1.1, 1.1)),
)
SCALE, SHIFT, LEAN = (0.84, 1.16), (10.0, 16.0), 0.08  # shift: canvas pixels across and down, at most
GAIN, GAMMA, BLUR, RESOLUTION = (0.82, 1.16), (0.8, 1.25), (0.3, 1.2), (0.45, 1.0)  # gain per channel; blur in pixels
NOISE, TILT = (5.0, 14.0), 3.0  # grey levels; degrees, at most
EXPOSURE, TINT = (0.7, 1.3), 0.1  # of each image: gain of all channels; standard deviation of each channel's own

Colour = tuple[int, int, int]
Point = tuple[float, float]
BLACK, WHITE, GREY, NAVY, BROWN = (40, 40, 45), (205, 205, 200), (122, 124, 128), (42, 48, 74), (96, 70, 54)
RED, BLUE, GREEN, YELLOW, PURPLE = (139, 61, 62), (64, 82, 128), (72, 106, 81), (190, 168, 105), (115, 82, 118)
KHAKI, ORANGE = (158, 144, 114), (173, 116, 79)
UPPER_COLOURS = (BLACK, WHITE, GREY, RED, BLUE, GREEN, YELLOW, PURPLE)
ACCENTS = (WHITE, BLACK, RED, BLUE, YELLOW, ORANGE)
LOWER_COLOURS, SHOE_COLOURS = (BLACK, GREY, NAVY, KHAKI, BROWN, WHITE), (BLACK, WHITE, RED, BROWN, BLUE)
HAIR_COLOURS = ((28, 24, 24), (74, 48, 34), (134, 88, 52), (206, 172, 106), (166, 166, 168))
SKINS = ((236, 196, 170), (206, 158, 124), (150, 104, 76), (92, 62, 48))
CAP_COLOURS, BAG_COLOURS = (RED, BLUE, WHITE, BLACK, YELLOW), (BLACK, RED, BLUE, BROWN, YELLOW)
BAGS = {"none": 0.4, "backpack": 0.2, "shoulder": 0.2, "hand": 0.2}  # share of each
PATTERNS = {  # patches in the accent colour: left and right of the torso (-1 to 1), collar (0) to hem (1)
    "horizontal": [(-1, 1, top, top + 0.11) for top in (0.16, 0.38, 0.6, 0.82)],
    "vertical": [(left, left + 0.24, 0.05, 1) for left in (-0.85, -0.36, 0.13, 0.62)],
    "blocks": [(-1, 1, 0.5, 1)],
    "jacket": [(-0.3, 0.3, 0, 0.3), (-0.36, 0.36, 0.3, 0.6), (-0.44, 0.44, 0.6, 1)],
    "logo": [(-0.5, 0.5, 0.22, 0.46)],
}
ONLY_IN_FRONT = ("jacket", "logo")
SHARED, TRAIN, TEST = range(3)  # of the random numbers

Upper = namedtuple("Upper", "colour pattern accent long_sleeves")
Lower = namedtuple("Lower", "kind colour shoes boots")
Head = namedtuple("Head", "hair colour skin")  # short, long, cap or bald; the colour is of the hair or the cap


@dataclass(frozen=True)
class Identity:
    upper: Upper
    lower: Lower
    head: Head
    bag: str  # one of BAGS
    bag_colour: Colour
    width: float
    height: float
    dyes: list[list[float]]  # (2, 3) grey levels added to the colours of the upper and of the lower body
    cameras: list[int]  # from 1, of each image


ALL_UPPERS = [Upper(colour, "plain", colour, long) for colour, long in product(UPPER_COLOURS, (False, True))]
ALL_UPPERS += [
    Upper(*choice) for choice in product(UPPER_COLOURS, PATTERNS, ACCENTS, (False, True)) if choice[0] != choice[2]
]
KINDS = ("trousers", "shorts", "skirt")
ALL_LOWERS = [Lower(*choice) for choice in product(KINDS, LOWER_COLOURS, SHOE_COLOURS, (False, True))]
ALL_HEADS = [Head(*choice) for choice in product(("short", "long"), HAIR_COLOURS, SKINS)]
ALL_HEADS += [Head("cap", *choice) for choice in product(CAP_COLOURS, SKINS)]
ALL_HEADS += [Head("bald", skin, skin) for skin in SKINS]


def generator(seed: int, split: int = SHARED, identity: int = 0, image: int = 0) -> np.random.Generator:
    """The random numbers of an image (from 1), an identity (image 0) or, in SHARED, of a camera or the templates."""
    return np.random.default_rng((seed, split, identity, image))


def people(seed: int, trap: bool, train_identities: int, test_identities: int, images: int) -> list[Identity]:
    """All persons, those of the training split first; the one at index i has the identity number i + 1.

    Raises ValueError if there are not enough combinations of templates, or upper bodies for the trap.
    """

    def distinct_triples(count: int, uppers: int) -> list[tuple[int, int, int]]:
        shape = (uppers, LOWERS, HEADS)
        return list(zip(*np.unravel_index(rng.choice(math.prod(shape), count, replace=False), shape), strict=True))

    rng = generator(seed)
    everything = (ALL_UPPERS, ALL_LOWERS, ALL_HEADS)
    uppers, lowers, heads = ([options[i] for i in rng.permutation(len(options))] for options in everything)
    if trap and train_identities > len(uppers):
        raise ValueError(
            f"the trap has {len(uppers)} upper bodies, so at most as many training identities can be drawn"
        )
    if trap:
        own_uppers = rng.choice(len(uppers), train_identities, replace=False)
        triples = [(upper, rng.integers(LOWERS), rng.integers(HEADS)) for upper in own_uppers]
        triples += distinct_triples(test_identities, TRAP_TEST_UPPERS)
    else:
        triples = distinct_triples(train_identities + test_identities, UPPERS)
    persons = []
    for identity, (upper, lower, head) in enumerate(triples, start=1):
        own_rng = generator(seed, TRAIN if identity <= train_identities else TEST, identity)
        persons.append(dress(own_rng, uppers[upper], lowers[lower], heads[head], images))
    return persons


def dress(rng: np.random.Generator, upper: Upper, lower: Lower, head: Head, images: int) -> Identity:
    """A person with these templates and what is one's own: bag, build, shades of the garments, cameras passed."""
    bag, bag_colour = str(rng.choice(list(BAGS), p=list(BAGS.values()))), BAG_COLOURS[rng.integers(len(BAG_COLOURS))]
    width, height, dyes = rng.uniform(0.85, 1.18), rng.uniform(0.93, 1.07), rng.normal(0, DYE, (2, 3)).tolist()
    fewest, most = CAMERAS_OF_AN_IDENTITY
    seen_by = rng.permutation(CAMERAS)[: rng.integers(fewest, min(most, images // 2) + 1)] + 1
    # Twice in each at least, so that the gallery of every camera holds an image beside the query.
    cameras = np.sort([*seen_by, *seen_by, *rng.choice(seen_by, images - 2 * len(seen_by))]).tolist()
    return Identity(upper, lower, head, bag, bag_colour, width, height, dyes, cameras)


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


@dataclass(frozen=True)
class Camera:
    gain: np.ndarray  # (3,)
    gamma: float
    blur: float
    resolution: float
    noise: float
    tilt: float
    far: np.ndarray  # (3,) grey levels of the background above
    near: np.ndarray  # and below


def muted(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(70, 185) + rng.normal(0, 5, 3)


def random_camera(rng: np.random.Generator) -> Camera:
    gain, gamma, blur = rng.uniform(*GAIN, 3), rng.uniform(*GAMMA), rng.uniform(*BLUR)
    resolution, noise, tilt = rng.uniform(*RESOLUTION), rng.uniform(*NOISE), rng.uniform(-TILT, TILT)
    return Camera(gain, gamma, blur, resolution, noise, tilt, far=muted(rng), near=muted(rng))


def texture(rng: np.random.Generator, cells: tuple[int, int], amplitude: float) -> np.ndarray:
    """Smooth noise around 1: (height, width, 1) of the scene."""
    coarse = Image.fromarray(rng.uniform(1 - amplitude, 1 + amplitude, cells).astype(np.float32))
    return np.asarray(coarse.resize(SCENE, Image.Resampling.BICUBIC))[..., None]


def background(camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Two colours that run into each other, a few things that stand around, texture: (height, width, 3) grey levels."""
    width, height = SCENE
    far, near = camera.far + rng.normal(0, 6, 3), camera.near + rng.normal(0, 6, 3)
    depth = (np.linspace(0, 1, height) - rng.uniform(0.35, 0.75)) / rng.uniform(0.03, 0.3) + 0.5
    scene = np.repeat(far + np.clip(depth, 0, 1)[:, None, None] * (near - far), width, axis=1).astype(np.float32)
    for _ in range(rng.integers(1, 5)):
        left, right = sorted(rng.integers(0, width, 2))
        top = rng.integers(0, height // 2)
        scene[top : top + rng.integers(8, height // 2), left : min(right, left + width // 2)] = muted(rng)
    return scene * texture(rng, (13, 7), 0.14)


def stamp(scene: np.ndarray, canvas: Image.Image, rng: np.random.Generator) -> None:
    """Put a canvas over the scene, in place: its surface rounded, lit from one side and creased."""
    layer = canvas.reduce(2)
    pixels = np.asarray(layer, dtype=np.float32)
    inside = np.asarray(layer.getchannel("A").filter(ImageFilter.BoxBlur(2)), dtype=np.float32)[..., None] / 255
    light = np.linspace(-1, 1, SCENE[0], dtype=np.float32)[:, None] * rng.uniform(-0.2, 0.2)
    shading = (0.58 + 0.46 * inside + light) * texture(rng, (26, 14), 0.12)
    scene += pixels[..., 3:] / 255 * (pixels[..., :3] * shading - scene)


def occluder(rng: np.random.Generator) -> Image.Image:
    """A box, a board or a post with seams on a transparent canvas (RGBA)."""
    _, *ranges = OCCLUDERS[rng.choice(len(OCCLUDERS), p=[share for share, *_ in OCCLUDERS])]
    left, right, top, bottom = np.array([rng.uniform(*bounds) for bounds in ranges]) * np.repeat(CANVAS, 2)
    colour = muted(rng)
    canvas = Image.new("RGBA", CANVAS)
    ink = ImageDraw.Draw(canvas)
    ink.rounded_rectangle((left, top, right, bottom), radius=6, fill=toned(colour, 0.8))
    ink.rounded_rectangle((left, top, right, top + 7), radius=3, fill=toned(colour, 1.15))
    for seam in np.arange(left, right, rng.uniform(14, 40)):
        ink.line((seam, top + 9, seam, bottom - 3), toned(colour, 0.65), width=2)
    return canvas


def photograph(person: Identity, others: list[Identity], camera: Camera, rng: np.random.Generator) -> Image.Image:
    """One image of the person, perhaps with one of the others at the edge: RGB, WIDTH x HEIGHT."""
    scene = background(camera, rng)
    if rng.random() < BYSTANDER:
        pose, side = random_pose(rng), rng.choice((-1, 1)) * rng.uniform(0.34, 0.5)
        pose = replace(pose, x=CANVAS[0] * (0.5 + side), y=pose.y - rng.uniform(0, 12), size=0.88 * pose.size)
        stamp(scene, draw_person(others[rng.integers(len(others))], pose), rng)
    stamp(scene, draw_person(person, random_pose(rng)), rng)
    if rng.random() < OCCLUDER:
        stamp(scene, occluder(rng), rng)
    return develop(scene, camera, rng)


def develop(scene: np.ndarray, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """What the camera makes of the scene, a little different every time."""
    image = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))
    image = image.rotate(camera.tilt + rng.normal(0, 0.7), Image.Resampling.BILINEAR)
    resolution = np.clip(camera.resolution + rng.normal(0, 0.05), *RESOLUTION)
    view = (MARGIN, MARGIN, MARGIN + WIDTH, MARGIN + HEIGHT)
    image = image.resize((round(WIDTH * resolution), round(HEIGHT * resolution)), Image.Resampling.BILINEAR, view)
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.7, 1.3)))
    pixels = (np.asarray(image, dtype=np.float32) / 255) ** (camera.gamma * rng.uniform(0.9, 1.1))
    pixels *= (255 * camera.gain * rng.uniform(*EXPOSURE) * rng.normal(1, TINT, 3)).astype(np.float32)
    pixels += camera.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw(
    folder: Path,
    trap: bool = False,
    seed: int = 0,
    train_identities: int = 200,
    test_identities: int = 200,
    images_per_identity: int = 10,
) -> None:
    """Write the set below `folder` in the layout of Market-1501: PNG, RGB, 96 pixels high and 48 wide.

    `trap` gives every training identity an upper body of its own, while the test identities share a few. The folder
    appears when the set is complete, or not at all.

    Raises UserError if `folder` exists and is not empty; ValueError if an identity would have fewer than 6
    images, or for more identities than numbers (9999), combinations of templates or, in the trap, upper bodies.
    """
    if images_per_identity < 2 * CAMERAS_OF_AN_IDENTITY[0] or train_identities + test_identities > 9999:
        raise ValueError("at least 6 images per identity and at most 9999 identities can be drawn")
    persons = people(seed, trap, train_identities, test_identities, images_per_identity)
    with whole_folder(folder) as unfinished:
        write_images(unfinished, seed, persons, train_identities)


def write_images(folder: Path, seed: int, persons: list[Identity], train_identities: int) -> None:
    """Every image of every person; the first of a test identity in a camera is a query, the rest is gallery."""
    for name in SPLITS:
        (folder / name).mkdir()
    cameras = {number: random_camera(generator(seed, SHARED, number)) for number in range(1, CAMERAS + 1)}
    shots = [(identity, image) for identity, person in enumerate(persons) for image in range(len(person.cameras))]
    for running, (identity, image) in enumerate(tqdm(shots, desc="drawing pedestrians", unit=" image"), start=1):
        passed, number = persons[identity].cameras[:image], persons[identity].cameras[image]
        if identity < train_identities:
            split, others, name = TRAIN, persons[:train_identities], "bounding_box_train"
        else:
            split, others = TEST, persons[train_identities:]
            name = "bounding_box_test" if number in passed else "query"
        rng = generator(seed, split, identity + 1, image + 1)
        picture = photograph(persons[identity], others, cameras[number], rng)
        file = f"{identity + 1:04d}_c{number}s1_{running:06d}_{image + 1:02d}.png"
        picture.save(folder / name / file, compress_level=1)
