"""Fetch a model's files from the Hugging Face Hub, and say in plain words why that failed."""

import functools
import os
from pathlib import Path

from workflows.errors import UserError
from workflows.files import no_room_explained

_SMALL = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_OLD_WEIGHTS = ["*.bin"]
_IGNORE = ["*/*", "training_args.bin"]  # subfolders hold other formats of the same weights (original/, onnx/)
_OFFLINE = (
    "Check the network (and HF_ENDPOINT, HF_HUB_OFFLINE and proxy variables) and run the same command again: what has "
    "arrived is kept. Without the Hub, `--model embedded`, a local folder or a .gguf file work."
)


def fetch_from_hub(hub_id: str, revision: str | None = None) -> Path:
    """Download safetensors (or, where a repository has none, `.bin` weights), tokenizer, template and configuration.

    A repository with an adapter in PEFT's format is fetched alike; its base is another model.

    Files land in the Hub's own cache (`HF_HOME`), where an interrupted download is resumed and other tools find them.

    Args:
        hub_id: `ORG/NAME`.
        revision: A branch, tag or commit; the main branch if None.

    Returns:
        The folder with the files; its name is the commit.

    Raises:
        UserError: If there is no such model or revision, no access to it, no network, or no room.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{hub_id}"
    try:
        with no_room_explained(Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))):
            fetch = functools.partial(snapshot_download, hub_id, revision=revision, ignore_patterns=_IGNORE)
            folder = Path(fetch(allow_patterns=_SMALL + _WEIGHTS))
            if not any(folder.glob("*.safetensors")):
                folder = Path(fetch(allow_patterns=_SMALL + _OLD_WEIGHTS))
        return folder
    except GatedRepoError:
        raise UserError(
            f"{hub_id} is gated: its owner wants you to accept the licence first.\n"
            f"  1. Open {page}, log in and accept.\n"
            "  2. Make a token at https://huggingface.co/settings/tokens (read access, gated repositories included).\n"
            "  3. Run again with the environment variable HF_TOKEN set to it."
            + ("" if not os.environ.get("HF_TOKEN") else "\nThe HF_TOKEN that is set now has no access (yet).")
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"There is no model {hub_id!r} on the Hub that you can see. Check the spelling at {page}; for a private "
            "model set HF_TOKEN. Names known here are in checkpoints/registry.yaml."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{hub_id} has no revision {revision!r}. Its branches and tags: {page}/tree/main") from None
    except HFValidationError as e:
        raise UserError(f"{hub_id!r} is not a Hub id: {e}") from None
    except LocalEntryNotFoundError:
        raise UserError(f"The Hugging Face Hub cannot be reached and its cache lacks {hub_id}. {_OFFLINE}") from None
    except (httpx.HTTPError, ConnectionError, RuntimeError) as e:  # the last two: hf_xet, which wraps nothing
        raise UserError(f"The download of {hub_id} broke off ({e}). {_OFFLINE}") from None
