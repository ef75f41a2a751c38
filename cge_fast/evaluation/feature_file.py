"""Features in a file: .npz, or .parquet for other programs' tables; read back, or of somebody else's making.

Keys of the .npz, and columns of the .parquet:

- `features` (N, C), floating
- `paths` (N,), text
- `identities`, `cameras` (N,), whole numbers or text; absent where they are not known
- `made_by`: JSON of the network and the settings that the features are of (in a .parquet: metadata of the table)

Only `features` must be there.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cge_fast import files
from cge_fast.errors import UserError

SUFFIXES = (".npz", ".parquet")
MADE_BY = "made_by"


class FeatureFile(NamedTuple):
    """What a file holds of N images."""

    features: Tensor  # (N, C) float32, on the CPU
    paths: np.ndarray | None = None  # (N,) str
    identities: np.ndarray | None = None  # (N,) int64 or str
    cameras: np.ndarray | None = None
    made_by: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it


def check_output(file: Path) -> None:
    """Raises UserError, before any work, if the file's format is unknown or its package not installed."""
    if file.suffix not in SUFFIXES or file.is_dir():
        raise UserError(f"output: must be a file that ends in {' or '.join(SUFFIXES)}, got {file}")
    if file.suffix == ".parquet":
        parquet("output")


def parquet(option: str) -> Any:
    """The module pyarrow.parquet; UserError without it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{option}: .parquet needs pyarrow: pip install 'cge-fast[search]'") from error
    return pyarrow.parquet


def write(file: Path, content: FeatureFile) -> None:
    """Writes the file whole or not at all."""
    arrays: dict[str, Any] = {"features": content.features.cpu().numpy()}
    arrays |= {name: labels for name, labels in content._asdict().items() if isinstance(labels, np.ndarray)}
    made_by, buffer = json.dumps(content.made_by), io.BytesIO()
    if file.suffix == ".npz":
        np.savez(buffer, **arrays, made_by=np.array(made_by))
    else:
        import pyarrow

        flat, channels = arrays["features"].ravel(), arrays["features"].shape[1]
        columns = arrays | {"features": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), channels)}
        table = pyarrow.table(columns).replace_schema_metadata({MADE_BY: made_by})
        parquet("output").write_table(table, buffer)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.replace(file, buffer.getvalue())


def read(file: Path, option: str, needed: Sequence[str] = ()) -> FeatureFile:
    """Reads a file.

    Args:
        file: it.
        option: what it was given by, which errors name.
        needed: which keys must be there besides `features`.

    Raises:
        UserError: the file is missing, damaged or of another form.
    """
    if file.suffix not in SUFFIXES or not file.is_file():
        raise UserError(f"{option}: must be a file of features that ends in {' or '.join(SUFFIXES)}, got {file}")
    package = parquet(option) if file.suffix == ".parquet" else None
    try:
        arrays = of_parquet(package, file) if package else dict(np.load(file, allow_pickle=False))
        made_by = dict(json.loads(str(arrays.pop(MADE_BY, "{}"))))
    except Exception as error:  # what NumPy and pyarrow raise for damaged files has no common base
        raise UserError(f"{option}: {file} cannot be read ({error})") from error
    for name in ("features", *needed):
        if name not in arrays:
            raise UserError(f"{option}: {file} has no {name}, but {', '.join(arrays) or 'nothing'}")
    features = given = arrays["features"]
    if given.dtype.kind == "f":
        with np.errstate(over="ignore"):
            features = given.astype(np.float32, copy=not given.flags.writeable)
    if features.ndim != 2 or features.dtype != np.float32 or not np.isfinite(features).all():
        got = f"{given.shape} {given.dtype}"
        raise UserError(f"{option}: features of {file} must be (N, C), floating and finite, got {got}")
    known = {name: arrays[name] for name in ("paths", "identities", "cameras") if name in arrays}
    for name, array in known.items():
        if array.shape != (len(features),) or array.dtype.kind not in ("U" if name == "paths" else "iuU"):
            got = f"{array.shape} {array.dtype}"
            raise UserError(f"{option}: {name} of {file} must be ({len(features)},), numbers or text, got {got}")
    return FeatureFile(torch.from_numpy(features), **known, made_by=made_by)


def of_parquet(package: Any, file: Path) -> dict[str, Any]:
    """The table's columns as arrays."""
    table = package.read_table(file)
    arrays: dict[str, Any] = {}
    for name in {"features", "paths", "identities", "cameras"} & {*table.column_names}:
        values = table[name].to_numpy()
        if name == "features":
            channels = getattr(table[name].type, "list_size", 0)
            arrays[name] = np.stack(values) if len(values) else np.empty((0, channels), np.float32)
        else:
            arrays[name] = values.astype(str) if values.dtype.kind == "O" else values
    if made_by := (table.schema.metadata or {}).get(MADE_BY.encode()):
        arrays[MADE_BY] = made_by.decode()
    return arrays


def require_alike(query: FeatureFile, gallery: FeatureFile, option: str = "gallery") -> None:
    """Raises UserError if the features cannot be compared: of other lengths, or made otherwise."""
    if query.features.shape[1] != gallery.features.shape[1]:
        got = f"{gallery.features.shape[1]} numbers, the queries {query.features.shape[1]}"
        raise UserError(f"{option}: its features have {got}")
    for name in query.made_by.keys() & gallery.made_by.keys():
        ours, theirs = query.made_by[name], gallery.made_by[name]
        if ours != theirs:
            raise UserError(f"{option}: its features were made with {name} {theirs}, the queries' with {ours}")
