"""The Hugging Face hub: whether it can be reached, and folders to it, only where it is asked for."""

import http.client
import threading
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from lora_cli.doctor_report import Hub
from lora_cli.errors import InputError, SurroundingsError, shown
from lora_cli.redact import redact

_PATIENCE = 3.0  # seconds for an answer


def require_pushable(repo: str) -> None:
    """Look at what can be known before anything is written. Raises InputError, SurroundingsError."""
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except hub_errors.HFValidationError:
        raise InputError(f"--push: {repo[:200]} is no name of a hub repository; write it as user/name.") from None
    if huggingface_hub.get_token() is None:
        raise SurroundingsError("--push: there is no token for the hub here: run `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, repo: str, private: bool = True) -> str:
    """Create a repository on the hub, upload a folder to it and return its address. Raises SurroundingsError.

    A repository that exists already is left as it is.
    """
    require_pushable(repo)
    state = f"{folder} is whole; `hf upload {repo} {folder}` sends it when that is mended."
    try:
        url = huggingface_hub.create_repo(repo, private=private)
        huggingface_hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from lora")
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        why = {
            401: "the hub does not accept the token: run `hf auth login`",
            403: "the token may not write there: make one with write access, and `hf auth login`",
            409: "this repository exists already, and nothing is overwritten: name another one",
        }.get(status, f"the hub answers {status}: {shown(error, 200)}")
        raise SurroundingsError(f"--push: {repo}: {why}.", state=state) from None
    except Exception as error:  # the client's HTTP library changes with its version, and its errors with it
        raise SurroundingsError(
            f"--push: {repo}: the hub cannot be reached ({type(error).__name__}: {shown(error, 200)}).", state=state
        ) from None
    return str(url)


def cache_folder() -> Path:
    """Return where what comes from the hub is kept."""
    return Path(huggingface_hub.constants.HF_HUB_CACHE)


def look() -> Hub:
    """Say what is known of the hub from here; it has a few seconds to answer, unless it is switched off."""
    endpoint, offline = huggingface_hub.constants.ENDPOINT, bool(huggingface_hub.constants.HF_HUB_OFFLINE)
    reachable = None if offline else _answers(endpoint)
    return Hub(redact(endpoint), offline, huggingface_hub.get_token() is not None, reachable)


def _answers(address: str) -> bool:
    """Return whether anything answers at an address in time; looking up its name may take longer, and is left then."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError, http.client.HTTPException):  # the last: what answers speaks another protocol
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return answered.is_set()
