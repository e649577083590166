"""The folder of a base model: found here or on the hub, its weight files, what tells it from another."""

import hashlib
from pathlib import Path

from lora_cli import json_file, manifest, names
from lora_cli.errors import NOTHING_LOADED, ModelError, SurroundingsError, first_line_of, shown
from lora_cli.nearby import did_you_mean


def find_folder(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """Return the local folder of a model: a folder as it is, or a hub id's files, downloaded where needed.

    Of the hub's files the weights are left out where they are not asked for.

    Raises ModelError when there is no such model, SurroundingsError when the hub cannot be reached.
    """
    try:
        folder = Path(path).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long for the system, or ~ of a user it does not know
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"model.path: {shown(path)} is no path here: {reason}.", state=NOTHING_LOADED) from None
    if is_folder:
        if not (folder / "config.json").is_file():
            what = "has no config.json, so it is no model; name the folder that has one"
            if (folder / "adapter_config.json").is_file():
                what = "is an adapter, not a model; name the base it was trained on"
            raise ModelError(f"model.path: {path} {what}.", state=NOTHING_LOADED)
        return folder
    if folder.exists() or _is_spelt_as_folder(path):
        hint = did_you_mean(folder, Path.is_dir) or f" Folders are looked for from {Path.cwd()}."
        if "://" in path:
            hint = f" Of a model of the hub only its name is written: {'/'.join(folder.parts[-2:])}."
        raise ModelError(f"model.path: there is no model folder {path}.{hint}", state=NOTHING_LOADED)
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    wanted = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=wanted))
    except hub_errors.GatedRepoError:
        raise SurroundingsError(
            f"model.path: {path} is gated: accept its terms on its hub page, then run `hf auth login`.",
            state=NOTHING_LOADED,
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise ModelError(f"model.revision: {path} has no revision {revision}.", state=NOTHING_LOADED) from None
    except hub_errors.RepositoryNotFoundError:
        raise ModelError(
            f"model.path: {path} is no folder here and no model on the hub (or a private one: `hf auth login`)."
            + did_you_mean(folder, Path.is_dir),
            state=NOTHING_LOADED,
        ) from None
    except hub_errors.HFValidationError:
        raise ModelError(
            f"model.path: {shown(path)} is no folder here, and no name that a model of the hub can have (owner/name).",
            state=NOTHING_LOADED,
        ) from None
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HfHubHTTPError, OSError) as error:
        raise SurroundingsError(
            f"model.path: {path} is no folder here, and the hub cannot be reached to fetch it: {first_line_of(error)}."
            f"{did_you_mean(folder, Path.is_dir)} Where there is a network, `hf download {path}` fetches it.",
            state=NOTHING_LOADED,
        ) from None


def find_kept(path: str) -> Path | None:
    """Return the folder of a model where nothing has to be fetched for it: a folder, or what the hub's cache holds.

    Raises ModelError where there is no such folder.
    """
    if Path(path).expanduser().exists() or _is_spelt_as_folder(path):
        return find_folder(path, weights=False)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        found = huggingface_hub.try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return find_folder(path, weights=False)  # which says what is wrong with it, and asks no hub for such a name
    return Path(found).parent if isinstance(found, str) else None


def _is_spelt_as_folder(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or path.count("/") > 1


def require_whole(folder: Path, unread: str | None = None) -> None:
    """Raise ModelError where a model that was merged here is not as it was written; others have no manifest.

    Of files whose names end in `unread` only the size is looked at.
    """
    if (folder / manifest.MANIFEST).is_file() and (problems := manifest.problems_in(folder, unread)):
        raise ModelError(
            *problems, "Merge it again, or delete MANIFEST.json where you changed it.", state=NOTHING_LOADED
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights: those its index names, or the only one. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("model.safetensors")) or sorted(folder.glob("*.safetensors"))
    places = json_file.read_object(index, ModelError, NOTHING_LOADED).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(
            f"{index}: weight_map must be names of tensors with those of their files, found {shown(places)}. Fetch it "
            "again.",
            state=NOTHING_LOADED,
        )
    files = sorted(set(places.values()))
    for name in files:
        why = names.problem_with(name) or ("is in a folder" if "/" in name else None)
        if why is None and not (folder / name).is_file():
            why = "is not there"
        if why is not None:
            raise ModelError(
                f"{index}: names {shown(name)}, which is not in this folder: it {why}. Fetch the model again.",
                state=NOTHING_LOADED,
            )
    return [folder / name for name in files]


def fingerprint(folder: Path) -> str:
    """Return a hash of what makes a base model this one: its configuration, and its weights' headers and samples.

    Every tensor file gives its header and sixteen samples of 64 KiB, so that a model of 100 GB costs no more than a
    small one; two fine-tunes of one model differ in every sample.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
            digest.update(opened.read(min(header, 1 << 26)))
            for number in range(16):
                opened.seek(max(0, size * number // 16))
                digest.update(opened.read(1 << 16))
    return digest.hexdigest()[:32]
