"""Whether the hub has a model or a dataset, asked once, before anything is read from it."""

from __future__ import annotations

import os
from functools import cache

from megatron_lowbit.config import LowBitError, one_line, shown

CARD = {"model": "config.json", "dataset": "README.md"}  # what is read first


@cache
def check_on_hub(name: str, kind: str, key: str) -> None:
    """Raise LowBitError for what is no folder, is not in the local cache, and cannot be had from the hub.

    The hub's client asks five times more, over 25 seconds, where its first question did not get through, and has no
    setting for that. `HfApi` asks once. What it is told of a busy server or a gated repository is left to the client,
    which then waits, or says what to do.

    Args:
        name: A folder or a hub id.
        kind: "model" or "dataset".
        key: The config key that names it, for the message.
    """
    if os.path.isdir(name):
        return
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(name, CARD[kind], repo_type=kind), str):
            HfApi().repo_info(name, repo_type=kind, timeout=constants.DEFAULT_REQUEST_TIMEOUT)
        return
    except GatedRepoError:
        return
    except RepositoryNotFoundError:
        why = f"{constants.ENDPOINT} has no {kind} of that name, or it is private: correct it, or `hf auth login`"
    except HfHubHTTPError:
        return
    except HFValidationError:
        why = "it is no hub id either, which is NAME or OWNER/NAME"
    except Exception as error:  # whatever the HTTP library below the client raises
        why = f"{constants.ENDPOINT} cannot be asked for it ({one_line(error)}); give a path, or download it first"
    raise LowBitError(f"{key}={shown(name)} is not here, and {why}")
