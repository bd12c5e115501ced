"""The Hugging Face Hub: one commit up, one snapshot down, errors in a sentence."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

from torchlethe._cli.errors import UsageError
from torchlethe.hub.safety import check_names


def upload(folder: Path, repository: str, layout: Collection[str], private: bool) -> str:
    """Make one commit of a folder; files of the layout that it lacks are deleted, others are left alone.

    Args:
        folder: the files, no subfolders.
        repository: ``name/repository``, made if it does not exist.
        layout: the names that pushes write.
        private: whether only the owner may see it.

    Returns:
        The URL of the repository.

    Raises:
        UsageError: the Hub refused, or the repository exists and is public although ``private`` is asked for.
    """
    with _readable(repository):
        validate_repo_id(repository)
        hub = huggingface_hub.HfApi(library_name="torchlethe")
        url = hub.create_repo(repository, private=private or None, exist_ok=True)
        if private and not hub.repo_info(url.repo_id).private:
            raise UsageError(f"--private, but the repository '{repository}' is public already; nothing was pushed")
        ours = {path.name: path for path in sorted(folder.iterdir())}
        stale = [name for name in hub.list_repo_files(url.repo_id) if name in layout and name not in ours]
        operations: list[huggingface_hub.CommitOperationAdd | huggingface_hub.CommitOperationDelete] = [
            huggingface_hub.CommitOperationAdd(name, path) for name, path in ours.items()
        ]
        operations += [huggingface_hub.CommitOperationDelete(name) for name in stale]
        hub.create_commit(url.repo_id, operations, commit_message="lethe push")
        return str(url)


def download(repository: str, folder: Path, revision: str | None) -> None:
    """Fetch all files of a repository; their names are checked before the first byte.

    Args:
        repository: ``name/repository``.
        folder: where to put them.
        revision: branch, tag or commit.

    Raises:
        UsageError: the Hub refused, or a file could execute code.
    """
    with _readable(repository):
        validate_repo_id(repository)
        hub = huggingface_hub.HfApi(library_name="torchlethe")
        commit = hub.repo_info(repository, revision=revision).sha  # what is checked is what is fetched
        check_names(hub.list_repo_files(repository, revision=commit), repository)
        hub.snapshot_download(repository, revision=commit, local_dir=folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)


@contextlib.contextmanager
def _readable(repository: str) -> Iterator[None]:
    """Turn the Hub's errors into one sentence."""
    folder = f"for a folder write ./{repository}"
    try:
        yield
    except errors.HFValidationError:
        rule = "a repository is name/repository of letters, digits, '-', '_' and '.'"
        raise UsageError(f"'{repository}' is no name of a repository: {rule}; {folder}") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"the repository '{repository}' has no such revision") from None
    except errors.RepositoryNotFoundError:
        hint = "or you may not see it (hf auth login)"
        raise UsageError(f"there is no repository '{repository}' on the Hub, {hint}; {folder}") from None
    except errors.LocalTokenNotFoundError:
        raise UsageError(f"'{repository}': you are not logged in to the Hub (hf auth login); {folder}") from None
    except errors.OfflineModeIsEnabled:
        raise UsageError(f"'{repository}': HF_HUB_OFFLINE is set, so the Hub is out of reach; {folder}") from None
    except errors.HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise UsageError(f"'{repository}': the Hub refused ({reason.rstrip('.')}); {folder}") from None
    except errors.HTTPError as error:  # of the HTTP client below: no connection, no answer
        raise UsageError(f"'{repository}': the Hub cannot be reached ({type(error).__name__}); {folder}") from error
