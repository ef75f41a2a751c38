"""A folder of checkpointed tensors of which each rank writes, and reads, the rows of its classes.

torch.distributed.checkpoint writes and reads it, whatever the number of ranks then and now. The planners below say
which part of a whole tensor a rank has. A DTensor would say the same, but for torch.chunk's shares only, which may
leave the last ranks without a class where ClassShard shares N out evenly. The file .metadata is a pickle, as PyTorch
has it: whoever may write to the folder, and to the manifest beside it, can run code in the process that reads it.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from cge_fast import files
from cge_fast.distributed import gather_dicts, rank
from cge_fast.errors import UserError
from cge_kernels import ClassShard

METADATA = ".metadata"  # as PyTorch calls it
Axes = dict[str, int]  # the tensors with a row for each class, and along which axis; of others every rank has the whole


def placed(tensor: Tensor, axis: int | None, shard: ClassShard) -> tuple[ChunkStorageMetadata, torch.Size]:
    """Where a rank's rows lie in the whole tensor, and how large that is."""
    offsets, size = [0] * tensor.dim(), list(tensor.shape)
    if axis is not None:
        offsets[axis], size[axis] = shard.first, shard.classes
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.shape), torch.Size(size)


class RowsSavePlanner(dcp.DefaultSavePlanner):
    """Plans to write a rank's rows, and on rank 0 what has no rows."""

    def __init__(self, axes: Axes, shard: ClassShard):
        super().__init__(flatten_state_dict=False)
        self.axes, self.shard = axes, shard

    def create_local_plan(self) -> SavePlan:
        """An item for each tensor."""
        items = []
        for name, tensor in self.state_dict.items():
            if name in self.axes or self.is_coordinator:
                chunk, size = placed(tensor, self.axes.get(name), self.shard)
                data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), size)
                items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The rows that an item is about."""
        return self.state_dict[index.fqn]


class RowsLoadPlanner(dcp.DefaultLoadPlanner):
    """Plans to read a rank's rows into the tensors that are given."""

    def __init__(self, axes: Axes, shard: ClassShard):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.axes, self.shard = axes, shard

    def create_local_plan(self) -> LoadPlan:
        """The items that overlap with each tensor."""
        items = []
        for name, tensor in self.state_dict.items():
            chunk, _ = placed(tensor, self.axes.get(name), self.shard)
            items += create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The rows that an item goes to."""
        return self.state_dict[index.fqn]


def write(folder: Path, tensors: dict[str, Tensor], axes: Axes, shard: ClassShard) -> dict[str, str]:
    """Writes the folder; every rank calls it, each with its rows of the tensors in `axes`.

    Returns:
        the SHA-256 of the files by their names, on every rank.

    Raises:
        UserError: the disk is full, or the like.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # without ranks, that there are none
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), planner=RowsSavePlanner(axes, shard))
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise UserError(f"checkpoint {folder} cannot be written ({cause})") from error
    own = [*folder.glob(f"__{rank()}_*"), *([folder / METADATA] if rank() == 0 else [])]
    return gather_dicts({file.name: files.sha256(file) for file in own})


def read(folder: Path, axes: Axes, shard: ClassShard | None, check: Callable[[Path], None]) -> dict[str, Tensor]:
    """The tensors on the CPU, with a shard only its rows of those in `axes`.

    Raises:
        UserError: a file is missing or damaged, or `check`, which is called for each before it is read, raised it.
    """
    check(folder / METADATA)
    reader = dcp.FileSystemReader(folder)
    try:
        metadata = reader.read_metadata()
        for file in needed_files(folder, metadata, axes, shard):
            check(file)
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            size = list(stored.size)
            if shard and name in axes:
                size[axes[name]] = shard.count
            tensors[name] = torch.empty(size, dtype=stored.properties.dtype)
        shard = shard or ClassShard(0, 0, 0)  # nothing lies before its rows
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that this process reads by itself
            dcp.load(tensors, storage_reader=reader, planner=RowsLoadPlanner(axes, shard), no_dist=True)
    except UserError:
        raise
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise UserError(f"checkpoint {folder} cannot be read ({cause})") from error
    except Exception as error:  # pickle has no common base for what damaged metadata raise
        raise UserError(f"checkpoint {folder} cannot be read ({error})") from error
    return tensors


def needed_files(folder: Path, metadata: Metadata, axes: Axes, shard: ClassShard | None) -> set[Path]:
    """The files with rows of a shard, or of all classes.

    Raises:
        UserError: one, which is named or its classes are, is missing or cut short.
    """
    needed = set()
    for index, place in metadata.storage_data.items():
        file, axis = folder / place.relative_path, axes.get(index.fqn, 0)
        chunks = metadata.state_dict_metadata[index.fqn].chunks
        first, count = next((c.offsets[axis], c.sizes[axis]) for c in chunks if c.offsets == index.offset)
        if shard and index.fqn in axes and (first >= shard.rows.stop or first + count <= shard.first):
            continue
        if not file.exists():
            raise UserError(f"checkpoint {folder} has no file with the rows of classes {first} to {first + count - 1}")
        if file.stat().st_size < place.offset + place.length:
            raise UserError(f"checkpoint {file} cannot be read (it is cut short)")
        needed.add(file)
    return needed
