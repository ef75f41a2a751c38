"""A person before a camera: background, bystander, occluder, and what the camera makes of the scene."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from cge_fast.data.pedestrians.figure import CANVAS, HEIGHT, MARGIN, SCENE, WIDTH, draw_person, random_pose, toned
from cge_fast.data.pedestrians.identities import Identity

BYSTANDER, OCCLUDER = 0.25, 0.30  # probabilities
OCCLUDERS = (  # share of each, then ranges of left, right, top and bottom as fractions of the canvas
    (0.4, (-0.3, 0.2), (0.8, 1.3), (0.58, 0.72), (1.1, 1.1)),
    (0.2, (-0.3, 0.2), (0.8, 1.3), (0.32, 0.42), (0.60, 0.72)),
    (0.2, (-0.3, 0.2), (0.8, 1.3), (-0.1, -0.1), (0.24, 0.40)),
    (0.1, (-0.1, -0.1), (0.34, 0.48), (-0.1, -0.1), (1.1, 1.1)),
    (0.1, (0.52, 0.66), (1.1, 1.1), (-0.1, -0.1), (1.1, 1.1)),
)
GAIN, GAMMA, BLUR, RESOLUTION = (0.82, 1.16), (0.8, 1.25), (0.3, 1.2), (0.45, 1.0)  # gain per channel; blur in pixels
NOISE, TILT = (5.0, 14.0), 3.0  # grey levels; degrees, at most
EXPOSURE, TINT = (0.7, 1.3), 0.1  # of each image: gain of all channels; standard deviation of each channel's own


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
    return expose(through_lens(arrange(person, others, camera, rng), camera, rng), camera, rng)


def arrange(person: Identity, others: list[Identity], camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """What stands before the camera: (height, width, 3) grey levels of the scene."""
    scene = background(camera, rng)
    if rng.random() < BYSTANDER:
        pose, side = random_pose(rng), rng.choice((-1, 1)) * rng.uniform(0.34, 0.5)
        pose = replace(pose, x=CANVAS[0] * (0.5 + side), y=pose.y - rng.uniform(0, 12), size=0.88 * pose.size)
        stamp(scene, draw_person(others[rng.integers(len(others))], pose), rng)
    stamp(scene, draw_person(person, random_pose(rng)), rng)
    if rng.random() < OCCLUDER:
        stamp(scene, occluder(rng), rng)
    return scene


def through_lens(scene: np.ndarray, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """The scene tilted, at the camera's resolution and blurred, a little different every time."""
    image = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))
    image = image.rotate(camera.tilt + rng.normal(0, 0.7), Image.Resampling.BILINEAR)
    resolution = np.clip(camera.resolution + rng.normal(0, 0.05), *RESOLUTION)
    view = (MARGIN, MARGIN, MARGIN + WIDTH, MARGIN + HEIGHT)
    image = image.resize((round(WIDTH * resolution), round(HEIGHT * resolution)), Image.Resampling.BILINEAR, view)
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.7, 1.3)))


def expose(image: Image.Image, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Gamma, exposure, tint and noise of the camera."""
    pixels = (np.asarray(image, dtype=np.float32) / 255) ** (camera.gamma * rng.uniform(0.9, 1.1))
    pixels *= (255 * camera.gain * rng.uniform(*EXPOSURE) * rng.normal(1, TINT, 3)).astype(np.float32)
    pixels += camera.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
