"""Names for ``torch._logging.set_logs``: the log ``attncompile`` and its artifact, the lines of sites.

Not by an entry point ``torch.backends``, which PyTorch 2.13 calls before it reads ``TORCH_LOGS``: whatever went wrong
in our import would make torch itself impossible to import.
"""

from __future__ import annotations

import logging

LOG = "attncompile"
"""What ``TORCH_LOGS`` calls everything that attncompile logs."""

SITES = "attncompile_sites"
"""What torch's logs and ``TORCH_TRACE`` call the line for each attention site."""


def register() -> None:
    """Make both names known to torch; a second time changes nothing. Never raises."""
    try:
        from torch._logging._internal import register_artifact, register_log

        register_log(LOG, LOG)
        register_artifact(SITES, "What became of each attention site of a graph that attncompile compiled.")
    except Exception:  # another version of torch: its logs lack our names, and nothing else
        logging.getLogger(LOG).debug("torch's logs could not be told the names of attncompile", exc_info=True)


def site_logger() -> logging.Logger:
    """Where the line for each site goes: torch's log for the artifact, below the log ``attncompile``."""
    register()
    try:
        from torch._logging._internal import getArtifactLogger

        return getArtifactLogger(f"{LOG}.backend", SITES)
    except (ImportError, ValueError):  # not registered
        return logging.getLogger(f"{LOG}.backend")


__all__ = ["LOG", "SITES", "register", "site_logger"]
