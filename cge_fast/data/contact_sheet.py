"""A picture of a data set: a row of images for each of some identities."""

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from PIL import ImageDraw

from cge_fast import files
from cge_fast.data.images import Image, ReidSet, open_rgb
from cge_fast.errors import UserError

CELL_WIDTH, MOST_CELL_HEIGHT, LABEL_WIDTH = 64, 128, 72  # pixels
COLUMNS = 12  # images of an identity, at most


def contact_sheet(reid_set: ReidSet, file: Path, identities: int = 12) -> None:
    """Writes a PNG: a row for each of `identities` people, half of them of the test split; images say the camera.

    Images of any size are fitted into cells of 64 x 128 pixels (lower ones if none needs the height) beside a label.
    """
    rows = rows_of("train", reid_set.train, identities - identities // 2)
    rows += rows_of("test", [*reid_set.query, *reid_set.gallery], identities // 2)
    pictures = {image: fitted(open_rgb(image.path)) for _, images in rows for image in images}
    if not pictures:
        raise UserError(f"{file}: the set holds nobody but distractors, there is nothing to show")
    columns = max(len(images) for _, images in rows)
    cell_height = max(picture.height for picture in pictures.values()) + 2
    sheet = PIL.Image.new("RGB", (LABEL_WIDTH + columns * CELL_WIDTH, len(rows) * cell_height), "white")
    ink = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows):
        top = row * cell_height
        ink.text((6, top + cell_height // 2 - 6), label, "black")
        for column, image in enumerate(images):
            left = LABEL_WIDTH + column * CELL_WIDTH
            sheet.paste(pictures[image], (left + 1, top + 1))
            ink.text((left + 4, top + 2), f"c{image.camera}", "white", stroke_width=1, stroke_fill="black")
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    files.replace(file, content.getvalue())


def fitted(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as large as fits into a cell."""
    scale = min((CELL_WIDTH - 2) / picture.width, (MOST_CELL_HEIGHT - 2) / picture.height)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))


def rows_of(split: str, images: Sequence[Image], count: int) -> list[tuple[str, list[Image]]]:
    """Label and images, by camera, of the first `count` identities; distractors (identity 0) are left out."""
    images_of = defaultdict(list)
    for image in images:
        if image.identity != 0:
            images_of[image.identity].append(image)
    chosen = sorted(images_of)[:count]
    by_camera = {identity: sorted(images_of[identity], key=lambda image: image.camera) for identity in chosen}
    return [(f"{split} {by_camera[identity][0].labels[0]}", by_camera[identity][:COLUMNS]) for identity in chosen]
