"""Tensors by name from files of safetensors, and arrays from .npz."""

import json
import math
import re
import zipfile
from collections import Counter
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.lib import format as npy

from .._extras import require
from .._text import count, listed


def load_safetensors(path: str | Path) -> dict[str, Any]:
    """The tensors of a safetensors file, of a folder of them, or of those that an index names.

    Args:
      path: "model.safetensors"; or a folder, of which the one "*.safetensors.index.json" is read,
        or else every "*.safetensors"; or such an index.

    Returns:
      PyTorch tensors by name.

    Raises:
      TypeError: for anything but a path.
      ValueError: for a path of another kind, a broken file, a name in two files, a folder that
        lacks some of its numbered files, for a name that an index promises in vain, and for an
        index that names a file outside its folder.

    Example:
      tensors = load_safetensors("checkpoints/llama")
    """
    if not isinstance(path, str | Path):
        raise TypeError(
            f"path must be a string or a pathlib.Path, got {type(path).__name__}. "
            f'Write "model.safetensors".'
        )
    load_file = require("safetensors.torch", "safetensors").load_file
    errors = require("safetensors").SafetensorError, OSError
    tensors: dict[str, Any] = {}
    files, promised = _files(Path(path))
    for file in files:
        try:
            found = load_file(file)
        except errors as error:
            raise ValueError(
                f"{file} is not a file of safetensors: {error}. Download or save it again."
            ) from error
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(
                f"{count(twice, 'name')} in {file} and in a file before: {listed(twice)}. "
                f"Give the path of one file."
            )
        tensors |= found
    if broken := sorted(promised - tensors.keys()):
        raise ValueError(
            f"{count(broken, 'name')} in the index of {path}, but in none of its files: "
            f"{listed(broken)}. Download the files again."
        )
    return tensors


def _check_numbered(folder: Path, files: list[Path]) -> None:
    """Raises ValueError if one of the files "name-00001-of-00003.safetensors" is missing."""
    found = [re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", file.name) for file in files]
    for (name, of), there in Counter(x.groups() for x in found if x).items():
        if there < int(of):
            raise ValueError(
                f"{folder} has {there} of the {int(of)} files {name}-*-of-{of}.safetensors. "
                f"Download the others, or give the path of one file."
            )


def _files(path: Path) -> tuple[list[Path], set[str]]:
    """The files to read, and the names that an index says are in them."""
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        files = indices or sorted(path.glob("*.safetensors"))
        if not files or len(indices) > 1:
            raise ValueError(
                f"{path} has {len(indices)} indices and no one to choose, or no *.safetensors. "
                f"Give the path of a file: {listed([x.name for x in files]) or 'it has none'}."
            )
        if not indices:
            _check_numbered(path, files)
            return files, set()
        path = indices[0]
    if path.name.endswith(".safetensors.index.json") and path.is_file():
        try:
            places = json.loads(path.read_text())["weight_map"]
            names, promised = sorted(set(places.values())), set(places)
            # Checked by name alone: the files of a download cache are links that lead elsewhere.
            outside = [x for x in names if PurePath(x).is_absolute() or ".." in PurePath(x).parts]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no index of safetensors files: it needs a weight_map of names to file "
                f"names ({type(error).__name__}: {error}). Download or save it again."
            ) from error
        if not promised:
            raise ValueError(
                f"{path} is an index of no tensor: its weight_map is empty. Download it again."
            )
        if outside:
            raise ValueError(
                f"{path}: {count(outside, 'file')} outside its folder: {listed(outside)}. "
                f"Put them beside the index, and write their names alone."
            )
        return [path.parent / name for name in names], promised
    if path.suffix == ".safetensors" and path.is_file():
        return [path], set()
    raise ValueError(
        f"{path} must be a folder, or a file that ends in .safetensors or .safetensors.index.json. "
        f"Of another file, give the state_dict that torch.load(path, weights_only=True) returns."
    )


def npz_array(file: Any, name: str) -> np.ndarray:
    """One array of an open .npz file, after a look at what its header claims.

    NumPy allocates what a header claims before it reads the data, so that a file of a few hundred
    bytes could ask for all of the memory.

    Args:
      file: what `np.load` returns for an .npz.
      name: of the array, without ".npy".

    Raises:
      ValueError: a header that claims more bytes than the file can hold, or others than follow it.
    """
    info = file.zip.getinfo(name if name in file.zip.namelist() else f"{name}.npy")
    with file.zip.open(info) as stream:
        version = npy.read_magic(stream)
        old = version == (1, 0)
        read = npy.read_array_header_1_0 if old else npy.read_array_header_2_0
        shape, _, dtype = read(stream)
        data = info.file_size - stream.tell()
    claimed = math.prod(shape) * dtype.itemsize
    # One of the .zip's two sizes may be false; a deflated byte unpacks to 1032 bytes at most.
    unpacked = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else 1032)
    held = min(info.file_size, unpacked)
    # A claim of fewer bytes would leave the end unread, where the checksum is compared.
    fits = claimed <= held and (claimed == data or dtype.hasobject)
    if not fits:
        raise ValueError(
            f"{name} claims shape {shape} and dtype {dtype}, {claimed:,} bytes, where the file "
            f"holds {held if claimed > held else data:,} at the most"
        )
    return file[name]
