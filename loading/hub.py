"""Repositories of the HuggingFace hub, as folders of its cache.

The hub is reached through `huggingface_hub`, which honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN; what is
in its cache already is not downloaded again, and is used when the hub cannot be reached.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from loading.containers.folder import WEIGHT_FILES, shard_names
from loading.errors import CheckpointError, listed, reason
from loading.modelopt_layout import DESCRIPTION_FILE

# The bare names that people type are redirects at the hub; the repositories themselves are these.
HUB_REPOSITORIES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}

# What tokenizer.py reads.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


# What ends a text, if a checkpoint has one: config.json's word on that counts no more then.
GENERATION_FILE = "generation_config.json"

#: Ends of the names of files that are whole checkpoints, of which a repository without config.json can have one.
WHOLE = (".gguf", ".nemo")


def download(repository: str, revision: str | None, with_weights: bool) -> Path:
    """The cache's folder of a hub repository, with the files that a checkpoint, or its tokenizer, needs in it.

    Of a repository without config.json, its one file that is a whole checkpoint.

    All files are of one commit: the first request resolves the revision, the others name the commit, so those that are
    cached already cost no request. The small files come first, so that cached weights imply a complete checkpoint.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"{repository!r}" if revision is None else f"{repository!r} at revision {revision!r}"
    unreachable: Exception | None = None  # why only the cache is consulted
    has_config = True

    def fail(what: str, error: BaseException) -> NoReturn:
        raise CheckpointError(f"{what}: {reason(error)}") from error

    # One request of our own decides between the hub and the cache: hf_hub_download would try to reach an absent
    # network for half a minute, for each file.
    try:
        if get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=revision)).commit_hash is None:
            unreachable = ConnectionError("the answer is not a hub's (is HF_ENDPOINT right?)")
    except HFValidationError as error:
        fail(f"{repository!r} is not a valid name at the hub", error)
    except RevisionNotFoundError:
        raise CheckpointError(f"the hub has {repository!r}, but not its revision {revision!r}") from None
    except EntryNotFoundError:
        has_config = False
    except Exception as error:  # no network, no permission, or whatever a proxy provokes: the cache may do
        unreachable = error

    def fetch(file: str, commit: str | None) -> Path | None:
        """The file's path in the cache, or None where the repository (or, without a hub, the cache) lacks it."""
        if commit is not None:
            cached = try_to_load_from_cache(repository, file, revision=commit)
            if isinstance(cached, str):
                return Path(cached)
            if cached is not None:  # the cache remembers that the repository has no such file
                return None
        try:
            return Path(
                hf_hub_download(repository, file, revision=commit or revision, local_files_only=unreachable is not None)
            )
        except LocalEntryNotFoundError as error:
            if unreachable is None:
                fail(f"the connection to the hub was lost before {file} of {asked} was downloaded", error)
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:
            fail(f"the download of {file} of {asked} failed (run again: complete files are kept)", error)

    if not has_config:
        try:
            names = [each.rfilename for each in HfApi().model_info(repository, revision=revision).siblings or ()]
        except Exception as error:
            fail(f"the files of {asked} cannot be listed", error)
        name = _whole_checkpoint(names, asked, repository) if with_weights else None
        path = None if name is None else fetch(name, None)
        if path is None:
            raise CheckpointError(
                f"{asked} at the hub is not a checkpoint: it has no config.json or *{' or *'.join(WHOLE)}"
            )
        return path
    config = fetch("config.json", None)
    if config is None and with_weights:
        cached = _cached(repository, revision)
        name = _whole_checkpoint([path.name for path in cached], asked, repository)
        if name is not None:
            return next(path for path in cached if path.name == name)
    if config is None:
        if isinstance(unreachable, GatedRepoError):
            raise CheckpointError(
                f"{asked} is gated at the hub: ask for access on its page and set HF_TOKEN"
            ) from unreachable
        if isinstance(unreachable, RepositoryNotFoundError):
            message = (
                f"there is no folder {repository!r}, and no such repository at the hub (or it is private: set HF_TOKEN)"
            )
            raise CheckpointError(message) from unreachable
        if isinstance(unreachable, OfflineModeIsEnabled):
            raise CheckpointError(
                f"{asked} is not in the cache, and HF_HUB_OFFLINE forbids a download"
            ) from unreachable
        fail(
            f"{asked} is not in the cache, and the hub cannot be reached",
            unreachable or FileNotFoundError("config.json"),
        )
    folder = config.parent
    for file in (*TOKENIZER_FILES, GENERATION_FILE, DESCRIPTION_FILE):
        fetch(file, folder.name)
    if not with_weights:
        return folder
    for file in WEIGHT_FILES:
        path = fetch(file, folder.name)
        if path is not None:
            if file.endswith(".index.json"):
                for shard in shard_names(path):
                    if fetch(shard, folder.name) is None:
                        raise CheckpointError(f"{asked} lacks the shard {shard} that its {file} names")
            return folder
    if unreachable is not None:
        fail(f"the weights of {asked} are not in the cache, and the hub cannot be reached", unreachable)
    return folder  # without weights: Checkpoint says so


def _whole_checkpoint(names: Iterable[str], asked: str, repository: str) -> str | None:
    """The file among those of a repository that is a checkpoint by itself; None where there is none."""
    found = sorted(name for name in names if name.endswith(WHOLE))
    if len(found) > 1:
        raise CheckpointError(
            f"expected one checkpoint in {asked}, got {listed(found)}: download one (hf download {repository} "
            f"{found[0]}) and name the file"
        )
    return found[0] if found else None


def _cached(repository: str, revision: str | None) -> list[Path]:
    """What the cache has of a repository, subfolders apart."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return list(Path(snapshot_download(repository, revision=revision, local_files_only=True)).iterdir())
    except LocalEntryNotFoundError:
        return []
