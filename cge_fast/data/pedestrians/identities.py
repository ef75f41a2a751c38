"""Who is drawn: the templates of upper bodies, lower bodies and heads, and each person's combination of them."""

import math
from collections import namedtuple
from dataclasses import dataclass
from itertools import product

import numpy as np

CAMERAS, CAMERAS_OF_AN_IDENTITY = 6, (3, 5)

# The difficulty of the set is in these constants and in how much the colours below differ.
UPPERS, LOWERS, HEADS = 30, 30, 24  # templates shared by all identities
TRAP_TEST_UPPERS = 6  # upper bodies shared by the test identities of the trap split
DYE = 3.0  # standard deviation of a person's own shade of a garment, in grey levels

Colour = tuple[int, int, int]
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
