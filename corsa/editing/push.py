"""Sends an adapter to the Hugging Face hub, or to the hub in HF_ENDPOINT."""

from __future__ import annotations

from pathlib import Path

from corsa.editing.history import FILE, open_line
from corsa.errors import CorsaError

KEPT = ("adapter_config.json", "adapter_model.safetensors", "README.md", "report.html", "metrics.json")
"""Files that are always sent: the adapter, its card and its report."""

FACTS = ("edits.parquet", "predictions.parquet", FILE)
"""Files that are sent on request: the facts, every answer, and the history."""


def to_send(adapter: str | Path, *, facts: bool = False) -> list[Path]:
    """The files of an adapter that `push` sends.

    Raises:
        CorsaError: there is no adapter.
    """
    directory = open_line(adapter).directory
    return [directory / name for name in (*KEPT, *(FACTS if facts else ())) if (directory / name).is_file()]


def push(
    adapter: str | Path,
    repository: str,
    *,
    private: bool = True,
    facts: bool = False,
    revision: str | None = None,
    message: str = "",
    token: str | None = None,
) -> str:
    """Creates the repository if it does not exist, and commits the adapter's files to it.

    Args:
        adapter: PEFT directory.
        repository: `owner/name`.
        private: whether a new repository is private.
        facts: send `FACTS` too; they may hold confidential data.
        revision: branch; default: main.
        message: commit message.
        token: hub token; default: HF_TOKEN, or the token of `hf auth login`.

    Returns:
        The URL of the commit.

    Raises:
        CorsaError: there is no adapter or no token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    directory = open_line(adapter).directory
    names = [file.name for file in to_send(adapter, facts=facts)]
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=names,
            revision=revision,
            commit_message=message or f"Adapter {directory.name}",
        )
    except HFValidationError as error:
        raise CorsaError(f"{repository!r} is no name of a repository: give owner/name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = (
            "hf auth login, or set HF_TOKEN to a token that may write" if status in (401, 403) else "try again later"
        )
        raise CorsaError(f"the hub refused {repository}: {str(error).splitlines()[0]}. {remedy}") from error
    except Exception as error:  # the library passes on any exception of its transport
        raise CorsaError(
            f"the hub at {api.endpoint} cannot be reached: {type(error).__name__}: {error}. "
            "Check the network and HF_ENDPOINT"
        ) from error
    return str(commit.commit_url)
