"""What is in a checkpoint: the Mechanics in a file of ``torch.save`` or a folder of ``torch.distributed.checkpoint``.

Nothing that a checkpoint may hold is run: files are read with ``weights_only=True``, and the metadata of a folder by an
unpickler that knows the few classes of which it is made.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manic.checkpoint.older import is_older, upgraded_group
from manic.checkpoint.record import FORMAT, Record, in_a_tuple, read
from manic.diagnostics import Snapshot, metrics, snapshot
from manic.parameters import DELTA, REF, REST

GROUP = re.compile(r"(.*\.)?param_groups\.(.+)\.(mechanic_(?:state|step|options|scheduler)|lr|name)")
SIZES = {REF: "x_ref", DELTA: "delta", REST: "rest"}

SAVED = (".pt", ".bin", ".ckpt", ".pth")  # what people, and frameworks, call the files of torch.save

METADATA = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class Found(NamedTuple):
    """A Mechanic in a checkpoint."""

    where: str  # the key that it lies under; "" at the top
    format: int  # in which it was written
    record: Record
    look: Snapshot
    sizes: dict[str, int]  # bytes of x_ref, Δ, the rest of x, and the base's own state
    tensors: int  # how many parameters have stepped
    numel: int  # their elements

    def as_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        look = self.look
        accumulators = [
            {
                **({"group": owner} if owner else {}),
                **dict(zip(("beta", "m", "v", "r", "s"), values, strict=True)),
            }
            for owner, tuner in zip(look.owners, look.tuners, strict=True)
            for values in zip(look.options.memories, *(field.tolist() for field in tuner[:4]), strict=True)
        ]
        return {
            **{"where": self.where, "format": self.format, **dataclasses.asdict(self.record)},
            **{"step": look.step, **metrics(look), "accumulators": accumulators},
            **{"bytes": self.sizes, "tensors": self.tensors, "numel": self.numel},
        }


def inspect(path: Path) -> list[Found]:
    """The Mechanics in a checkpoint.

    Raises:
        ValueError: the path leads to no checkpoint, to one that is damaged, or to one without a Mechanic.
    """
    try:
        values = dict(_of_folder(path) if path.is_dir() else _of_file(path))
        matches = [match for key in values if (match := GROUP.fullmatch(key)) and match[3] == "mechanic_state"]
        found = [_at(place, values) for place in dict.fromkeys(match[1] or "" for match in matches)]
    except (FileNotFoundError, PermissionError) as error:
        missing = f"a folder without {Path(error.filename).name}" if path.is_dir() else error.strerror
        files = sorted(file.name for file in path.glob("*") if file.suffix in SAVED)
        hint = f" (is it one of {files} in it?)" if files else ""
        raise ValueError(f"it cannot be read: {missing}{hint}") from error
    except pickle.UnpicklingError as error:
        raise ValueError("it is no checkpoint, or holds objects that are not safe to load (weights_only)") from error
    except ValueError:
        raise
    except Exception as error:  # whatever torch and pickle make of a file that is none of theirs
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"it is no checkpoint, or a damaged one: {reason}") from error
    if not found:
        raise ValueError("there is no Mechanic in this checkpoint (after unwrap() an optimizer is a plain one)")
    return found


def _at(place: str, values: dict[str, Any]) -> Found:
    groups: dict[str, dict[str, Any]] = {}
    sizes = {"x_ref": 0, "delta": 0, "rest": 0, "base": 0}
    numels: dict[str, int] = {}
    for key, value in values.items():
        match = GROUP.fullmatch(key)
        if match is not None and (match[1] or "") == place:
            groups.setdefault(match[2], {})[match[3]] = value
        elif key.startswith(f"{place}state."):
            name, _, what = key.removeprefix(f"{place}state.").rpartition(".")
            sizes[SIZES.get(what, "base")] += value.nbytes if isinstance(value, Tensor) else 0
            numels[name] = max(value.numel() if isinstance(value, Tensor) else 0, numels.get(name, 0))
    written = in_a_tuple(next(iter(groups.values())).get("mechanic_options"), "options are").get("format", FORMAT)
    groups = {name: upgraded_group(group) if is_older(group) else group for name, group in groups.items()}
    record, _ = read(list(groups.values()))
    live = list(groups.values())
    if not all(name.isdecimal() for name in groups):
        # A flattened state dict has a group for every parameter: alike, as far as we are concerned.
        names = [
            (str(group.get("name")), str(group.get("lr")), tuple(group["mechanic_state"].tolist())) for group in live
        ]
        live = [*dict(zip(names, live, strict=True)).values()]
    look = snapshot(live, record.options, record.unit)
    return Found(place.rstrip("."), written, record, look, sizes, len(numels), sum(numels.values()))


def _of_file(path: Path) -> Iterator[tuple[str, Any]]:
    """All that is in a file, under keys as DCP makes them: "optimizer.state.0.exp_avg"."""
    mapped = zipfile.is_zipfile(path)  # not those of torch before 1.6
    return _leaves("", torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    ours = key.rpartition(".")[2].startswith("mechanic_")  # the options are a dict in a tuple
    if not isinstance(value, dict | list | tuple) or ours:
        yield key, value
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(f"{key}.{name}" if key else str(name), inner)


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in METADATA.get(module, ()) or (
            module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not known:
            raise pickle.UnpicklingError(f"its metadata holds {module}.{name}")
        return super().find_class(module, name)


def _of_folder(path: Path) -> Iterator[tuple[str, Any]]:
    """All that is in a folder; of what is not in a param group, tensors that have a size alone."""
    with (path / ".metadata").open("rb") as file:
        metadata = _Metadata(file).load()
    places = {index.fqn: info for index, info in metadata.storage_data.items()}
    for key, about in metadata.state_dict_metadata.items():
        if GROUP.fullmatch(key):
            info = places[key]
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"{key} lies outside the folder, in {info.relative_path}")
            with (path / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                data = io.BytesIO(file.read(info.length))
            yield key, torch.load(data, map_location="cpu", weights_only=True)
        else:
            whole = hasattr(about, "size")
            yield key, torch.empty(about.size, dtype=about.properties.dtype, device="meta") if whole else None
