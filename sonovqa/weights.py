"""A model's weights before they are loaded: names, shapes and types from safetensors headers, and what is wrong with a folder."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sonovqa import credentials, files, torchvision_ops
from sonovqa.cli import UserError

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: its shape and its type as safetensors names it (``BF16``, ``F32``, …)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def check_folder(path: Path) -> None:
    """Raise `UserError` unless ``path`` holds a configuration, whole safetensors weights and processor files.

    Pickled weights are refused: loading them runs whatever code they hold. Only headers are read.
    """
    if not (path / "config.json").exists():
        inside = " (a run: use its merged/ folder)" if (path / "merged").is_dir() else ""
        raise UserError(f"{path} has no config.json, so it is no model folder{inside}; "
                        "name a Hugging Face model folder, a hub id or tiny")  # fmt: skip
    read_config(path)
    if not any((path / name).exists() for name in (SINGLE, INDEX)):
        found = [name for name in PICKLES if (path / name).exists()]
        if found:
            raise UserError(f"{path / found[0]} holds pickled weights, which run code when loaded; safetensors are allowed; "
                            "convert them first")  # fmt: skip
        raise UserError(f"{path} holds no weights; {SINGLE} is needed; download or merge the model again")
    of_folder(path)
    texts = (path / "tokenizer_config.json").exists() and takes_no_images(str(path))
    if not texts and not any((path / name).exists() for name in PROCESSORS):
        raise UserError(f"{path} lacks processor files (processor_config.json); save the full processor beside the weights")


def read_config(path: Path) -> dict:
    """A model folder's config.json. Raises `UserError` if it is not JSON or not a configuration."""
    try:
        config = files.read_json(path / "config.json")
    except (ValueError, OSError) as fault:
        told = f"{path / 'config.json'} is not JSON; {fault}; a model's configuration is needed; download the model again"
        raise UserError(told) from None
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'} is no configuration; a JSON object is needed; download the model again")
    return config


def is_text_only(config: dict) -> bool:
    """Whether a config.json is of a causal language model that takes no images, by transformers' own tables."""
    torchvision_ops.declare()  # before the first import of transformers, which notes what is installed
    from transformers.models.auto import modeling_auto

    kind = config.get("model_type")
    takes_images = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not takes_images


def takes_no_images(name: str) -> bool:
    """Whether a model folder, an adapter's folder or a hub id is of a text-only model."""
    folder = Path(name)
    if not folder.is_dir():
        return is_text_only(config_of(name))
    if any((folder / file).exists() for file in PROCESSORS):
        return False
    if not (folder / "config.json").exists():  # an adapter: train.py saved tokenizer or processor beside it
        return (folder / "tokenizer_config.json").exists()
    return is_text_only(read_config(folder))


def of_folder(path: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name.

    Raises:
        UserError: if a shard of the index is missing, or a file is cut off or no safetensors file.
    """
    names = [SINGLE]
    if not (path / SINGLE).exists():
        try:
            names = sorted(set(files.read_json(path / INDEX)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path / INDEX} is not an index of weights; download the model again") from None
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{path} lacks a part of its weights; {missing[0]}{more} of {len(names)} files; download the model again")
    return {name: tensor for file in names for name, tensor in of_file(path / file).items()}


def of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, from its header alone.

    Source: the format, https://github.com/huggingface/safetensors#format: 8 bytes little-endian header size, JSON, data.

    Raises:
        UserError: if the header cannot be read or the file is not as long as it says.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        wanted = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {name: Tensor(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as fault:
        raise UserError(f"{path} is no safetensors file; {fault}; download the model again") from None
    if size != wanted:
        raise UserError(f"{path} is damaged; {size:,} bytes; {wanted:,} by its header; download the model again")
    return found


def check_hub(name: str) -> None:
    """Raise `UserError` unless a hub id can be read: it exists, its terms were accepted, the hub or its cache is at hand.

    Its config.json is fetched for that, which loading it needs anyway.
    """
    from huggingface_hub import errors, get_token, hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its notes on every retry
    token = "the token in use was not granted access" if get_token() else "no token is set"
    try:
        hf_hub_download(name, "config.json")
        return
    except errors.HFValidationError:
        told = f"no model folder and no hub id: {name!r}; a local folder, <owner>/<model> on the hub, or tiny is allowed"
    except errors.GatedRepoError:
        told = f"{name} is gated; {token}; accept its terms at https://huggingface.co/{name}, then export HF_TOKEN=…"
    except errors.RepositoryNotFoundError:
        told = f"the hub has no model {name}, or it is private; {token}; check the name, or export HF_TOKEN=…"
    except errors.LocalEntryNotFoundError:
        told = (f"{name} is not in the cache and the hub cannot be reached; name a local folder or tiny, or mend the network "
                "(and unset HF_HUB_OFFLINE)")  # fmt: skip
    except errors.EntryNotFoundError:
        told = f"{name} on the hub has no config.json, so it is no model for transformers; name another"
    except OSError as fault:
        first = credentials.hub_fault(fault, 200)
        told = f"{name} cannot be had from the hub; {first}; try again, or name a local folder"
    raise UserError(told)


def of_hub(name: str) -> dict[str, Tensor] | None:
    """The tensors of a model on the hub, from its cached snapshot or the hub's own metadata; ``None`` if neither tells them.

    `models.locate` has found the model by then: what fails here is the network or a repository without safetensors, and
    the loader will say so.
    """
    from huggingface_hub import errors, get_safetensors_metadata, try_to_load_from_cache

    for file in (SINGLE, INDEX):
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):
            with contextlib.suppress(UserError):  # shards that are not there yet will be downloaded
                return of_folder(Path(cached).parent)
    try:
        metadata = get_safetensors_metadata(name)
    except (OSError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError):  # OSError: the hub's own among them
        return None
    stored = (file.tensors for file in metadata.files_metadata.values())
    return {name: Tensor(tuple(one.shape), one.dtype) for tensors in stored for name, one in tensors.items()}


def of_model(name: str) -> dict[str, Tensor] | None:
    """The tensors of a local folder or hub id; see `of_folder` and `of_hub`."""
    return of_folder(Path(name)) if Path(name).is_dir() else of_hub(name)


def config_of(name: str) -> dict:
    """The config.json of a local folder, or of a hub id from the hub's cache; empty if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return read_config(Path(name))
    cached = try_to_load_from_cache(name, "config.json")
    return read_config(Path(cached).parent) if isinstance(cached, str) else {}
