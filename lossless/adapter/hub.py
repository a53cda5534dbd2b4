"""Where adapters are: in the package, in a folder, or on the Hugging Face hub, where they are pushed to.

Knows: the files of an adapter, and what can go wrong on the way. Does not know: what is in them.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..errors import UsageError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter.safetensors"


def shipped_adapter(model: str) -> str | None:
    """The folder of the adapter that the package brings for this model, if it brings one."""
    folder = Path(str(files("lossless"))) / "adapters" / model
    return str(folder) if model == "demo" and folder.is_dir() else None


def find_adapter(source: str) -> Path:
    """The folder of a local adapter, or of one that is fetched by its hub id, `owner/name` or `owner/name@revision`."""
    path, (name, _, revision) = Path(source).expanduser(), source.partition("@")
    if path.exists():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UsageError(f"no adapter folder at {path}")
    from huggingface_hub import hf_hub_download

    try:  # file by file: a whole snapshot is asked for without a limit of time, which a hub that is silent would need
        folder = Path(hf_hub_download(name, CONFIG_FILE, revision=revision or None)).parent
        return Path(hf_hub_download(name, WEIGHTS_FILE, revision=folder.name)).parent
    except _hub_errors() as error:
        raise UsageError(f"no adapter folder at {path}, and the hub gave none by that name: {error}") from None


def _hub_errors() -> tuple[type[BaseException], ...]:
    """What can go wrong on the way to the hub: its own errors, and what they are kinds of, the transport's and the system's."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (*HfHubHTTPError.__bases__, HFValidationError)


_PATIENCE = 12  # times as long as for a download: an upload is answered when it has been worked on
_PUBLIC = [CONFIG_FILE, WEIGHTS_FILE, "*.md", "*.json", "*.jsonl", "*.png"]  # not checkpoints, nor what trackers write


def push_to_hub(folder: str | Path, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Upload an adapter, its card and its reports to the hub; returns where it is.

    Raises:
        UsageError: the hub refuses (no token, no right, no connection), or is silent.
    """
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    hub = HfApi()
    get_session().timeout = _PATIENCE * HF_HUB_DOWNLOAD_TIMEOUT  # of this process from now on: the client's own way is to wait for ever
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        if revision:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        hub.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, allow_patterns=_PUBLIC, ignore_patterns=["*/*"],
            commit_message="An adapter for lossless",
        )  # fmt: skip
    except _hub_errors() as error:
        raise UsageError(f"the hub did not take {folder} as {repo!r}: {str(error).strip().splitlines()[0]}") from error
    return f"{hub.endpoint}/{repo}"
