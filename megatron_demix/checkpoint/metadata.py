"""`.metadata` of a torch_dist checkpoint: which tensors it holds, cut into which chunks, at which bytes of which files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_demix.checkpoint.collector import without_collector
from megatron_demix.checkpoint.dtypes import ITEM_BYTES
from megatron_demix.checkpoint.layout import BACKEND, METADATA, convert, other_format, unreadable
from megatron_demix.checkpoint.pickles import Inert, enum_member, inert, ordered_dict, plain_tuple, read_pickle, shown
from megatron_demix.errors import CorruptInput

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Location:
    """Bytes of one item: a torch.save zip in a .distcp file. `file` is relative to the checkpoint's folder."""

    file: str
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a global tensor, and where it lies. layer: it is this index of what is stored, which has a dimension more."""

    offset: Shape
    shape: Shape
    location: Location
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A global tensor. dtype as torch names it, without "torch."; the chunks lie within the shape, in offset order."""

    key: str
    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """tensors by key; objects: pickled Python state (e.g. "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4") by key."""

    tensors: dict[str, TensorInfo]
    objects: dict[str, Location]


_FLATTENED = "model."
_DCP = "torch.distributed.checkpoint"
_CLASSES = (
    f"{_DCP}.metadata.Metadata",
    f"{_DCP}.metadata.MetadataIndex",
    f"{_DCP}.metadata.TensorStorageMetadata",
    f"{_DCP}.metadata.BytesStorageMetadata",
    f"{_DCP}.metadata.ChunkStorageMetadata",
    f"{_DCP}.metadata.TensorProperties",
    f"{_DCP}.metadata.StorageMeta",
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem._StorageInfo",
    f"{_DCP}.filesystem._StoragePrefix",  # in the ranks' plans, from a job's second save on if these are kept between saves
    f"{_DCP}.planner.SavePlan",
    f"{_DCP}.planner.WriteItem",
    f"{_DCP}.planner.WriteItemType",
    f"{_DCP}.planner.TensorWriteData",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "torch.serialization._get_layout",
)


_ALLOWED: dict[str, Any] = {
    "torch.Size": plain_tuple,
    "builtins.getattr": enum_member,
    "__builtin__.getattr": enum_member,
    "collections.OrderedDict": ordered_dict,
    **{f"torch.{name}": name for name in ITEM_BYTES},
    **{name: inert(name) for name in _CLASSES},
}


def read_metadata(folder: Path, wanted: Callable[[str], bool] | None = None) -> CheckpointMetadata:
    """Read and check `.metadata` (and metadata.json, where there is one) in a checkpoint's folder.

    wanted: whether a tensor is of interest, by key; of others only where they lie is looked at. None: all are.
    Raises CorruptInput naming the file: a forbidden class (nothing is executed), damage, or chunks that leave their tensor, are
    stored nowhere, or point out of the folder; IncompatibleInputs for another format, ConfigError for what may not be read.
    """
    folder = Path(folder)
    said = _check_backend(folder / BACKEND)
    path = folder / METADATA
    try:
        data = path.read_bytes()
    except OSError as e:
        raise unreadable(path, e) from e
    try:
        with without_collector():
            root = read_pickle(data, _ALLOWED, str(path))
            if not said:
                _check_keys(root["state_dict_metadata"], folder)
            return _interpret(root, path, wanted)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as e:
        raise CorruptInput(f"{path}: is not the metadata of a torch_dist checkpoint ({type(e).__name__}: {e}).") from e


def _check_backend(path: Path) -> bool:
    """Whether metadata.json is there, and says torch_dist. Raises for what else it says."""
    if not path.is_file():
        return False
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except OSError as e:
        raise unreadable(path, e) from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CorruptInput(f"{path}: cannot be read ({e!r}).") from e
    if backend != "torch_dist":
        raise other_format(path, repr(backend), convert(backend))
    return True


def _check_keys(entries: Mapping[str, Any], folder: Path) -> None:
    """Raises IncompatibleInputs where the keys are those of Megatron's formats that have no metadata.json: a state dictionary
    as torch.distributed.checkpoint flattens it, with the model in `model`."""
    if any(isinstance(key, str) and key.startswith(_FLATTENED) for key in entries):
        raise other_format(
            folder,
            f"'torch_dcp' or 'fsdp_dtensor' (it has no {BACKEND}, and its weights are named '{_FLATTENED}*')",
            "Train with --ckpt-format torch_dist, which --use-torch-fsdp2 takes and --use-megatron-fsdp does not. For that, "
            "Megatron-LM's checkpoint_inspector.py convert-torch-dist-to-fsdp-dtensor converts what is merged.",
        )


def _interpret(root: Any, path: Path, wanted: Callable[[str], bool] | None) -> CheckpointMetadata:
    stored: dict[tuple[str, Shape | None], Location] = {}
    for index, info in root["storage_data"].items():
        key, offset = index["fqn"], index.get("offset")
        if not isinstance(key, str):
            raise TypeError(f"name {shown(key)}")
        stored[key, None if offset is None else _sizes(offset)] = _location(info, key, path)
    _check_apart(stored, path)
    num_chunks = 0
    tensors, objects = {}, {}
    for key, entry in root["state_dict_metadata"].items():
        if not isinstance(key, str) or not isinstance(entry, Inert):
            raise TypeError(f"entry {shown(key)}")
        if entry.name.endswith("BytesStorageMetadata"):
            if (key, None) not in stored:
                raise CorruptInput(f"{path}: object {key!r} is listed but stored nowhere.")
            objects[key] = stored[key, None]
        elif wanted is None or wanted(key):
            tensors[key] = info = _tensor(key, entry, stored, path)
            # Each has bytes of its own; of one list that many tensors share there would be more than memory holds.
            num_chunks += len(info.chunks)
            if num_chunks > len(stored):
                raise CorruptInput(
                    f"{path}: lists more chunks than the {len(stored)} that are stored: the metadata is damaged."
                )
    return CheckpointMetadata(tensors, objects)


def _check_apart(stored: dict[tuple[str, Shape | None], Location], path: Path) -> None:
    """Each item has bytes of its own: of two at one place, one is not where the other says it is."""
    entries = sorted(stored.items(), key=lambda entry: (entry[1].file, entry[1].position))
    for ((key, _), one), ((other, _), next_one) in itertools.pairwise(entries):
        if one.file == next_one.file and one.position + one.length > next_one.position:
            raise CorruptInput(f"{path}: {key!r} and {other!r} lie at the same bytes of {one.file}: the metadata is damaged.")


def _tensor(key: str, entry: Inert, stored: dict[tuple[str, Shape | None], Location], path: Path) -> TensorInfo:
    shape, properties = _sizes(entry["size"]), entry["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise TypeError(f"dtype of {key!r}")
    chunks = []
    for chunk in entry["chunks"]:
        offset, size = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
        if len(offset) != len(shape) or len(size) != len(shape):
            raise CorruptInput(f"{path}: a chunk of {key!r} has {len(offset)} dimensions, its tensor {len(shape)}.")
        if any(o + s > g for o, s, g in zip(offset, size, shape, strict=True)):
            raise CorruptInput(f"{path}: chunk {size} at {offset} of {key!r} leaves its tensor {shape}.")
        if (key, offset) not in stored:
            raise CorruptInput(f"{path}: chunk at {offset} of {key!r} is listed but stored nowhere.")
        chunks.append(Chunk(offset, size, stored[key, offset]))
    return TensorInfo(key, dtype, shape, tuple(sorted(chunks, key=lambda c: c.offset)))


def _sizes(value: Any) -> Shape:
    sizes = tuple(value)
    for n in sizes:
        if not (isinstance(n, int) and 0 <= n < 1 << 62):
            raise ValueError(f"sizes {shown(sizes)}")
    return sizes


def _location(info: Inert, key: str, path: Path) -> Location:
    if info.get("transform_descriptors"):
        raise CorruptInput(
            f"{path}: {key!r} is stored transformed ({shown(info['transform_descriptors'])}), which cannot be merged. Save it "
            "without storage extensions (compression, encryption)."
        )
    file, position, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
        raise CorruptInput(f"{path}: {key!r} lies in {shown(file)}, expected a file of the checkpoint's own folder.")
    if not (isinstance(position, int) and isinstance(length, int) and 0 <= position < 1 << 62 and 0 < length < 1 << 62):
        raise CorruptInput(f"{path}: {key!r} lies at bytes {shown(position)}+{shown(length)} of {file}.")
    return Location(file, position, length)
