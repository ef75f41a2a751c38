"""A user's own crops: root/split/identity/camera_anything.jpg."""

from collections import defaultdict
from pathlib import Path

from cge_fast.data.images import Image, ReidSet, image_files
from cge_fast.errors import UserError


def read_folder(root: Path) -> ReidSet:
    """Reads root/train, root/query and root/gallery; in each a folder for each identity, named as you like.

    The camera is what stands before the first underscore of a file's name, any text. Identities and cameras with the
    same name are the same in every split.

    Raises:
        UserError: a split is missing or has no image, or a file is not where it must be or names no camera.
    """
    entries = [
        (split, *described(path, root / split))
        for split in ("train", "query", "gallery")
        for path in image_files(root / split)
    ]
    # From 1 on, since identity 0 would be distractors.
    names = sorted({identity for _, _, identity, _ in entries})
    identities = {name: number for number, name in enumerate(names, start=1)}
    cameras = {name: number for number, name in enumerate(sorted({camera for *_, camera in entries}))}
    images = defaultdict(list)
    for split, path, identity, camera in entries:
        images[split].append(Image(path, identities[identity], cameras[camera]))
    return ReidSet(**images)


def described(path: Path, folder: Path) -> tuple[Path, str, str]:
    """(path, identity, camera) of one image below a split's folder."""
    parts = path.relative_to(folder).parts
    camera, underscore, _ = path.name.partition("_")
    if len(parts) != 2 or not underscore or not camera:
        raise UserError(f"image {path} must lie at {folder}/<identity>/<camera>_<anything>{path.suffix}")
    return path, parts[0], camera
