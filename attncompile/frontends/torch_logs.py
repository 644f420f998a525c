"""What torch's logs know of us: the logs ``attncompile`` and ``attncompile.sites``, the artifact of the lines of sites,
and why Dynamo compiles a graph again.

The names are not told to torch by an entry point ``torch.backends``, which PyTorch 2.13 calls before it reads
``TORCH_LOGS``: whatever went wrong in our import would make torch itself impossible to import. Instead the log of sites
has the name of a module, which ``TORCH_LOGS`` takes without having heard of it.
"""

from __future__ import annotations

import logging

LOG = "attncompile"
"""What ``TORCH_LOGS`` calls everything that attncompile logs."""

SITE_LOG = "attncompile.sites"
"""What ``TORCH_LOGS`` calls the lines of sites alone: the module of this name exists for that."""

SITES = "attncompile_sites"
"""What torch's logs and ``TORCH_TRACE`` call the line for each attention site, as an artifact."""

_OTHER_VERSION = (ImportError, AttributeError, TypeError, ValueError)
"""What asking another version of torch for these private names ends in."""


def register() -> None:
    """Make the names known to torch; a second time changes nothing, another version of torch goes without.

    The log of sites is a child of the other and has no name of its own, or torch would print its lines twice.
    """
    try:
        from torch._logging._internal import register_artifact, register_log

        register_log(LOG, LOG)
        register_artifact(SITES, "What became of each attention site of a graph that attncompile compiled.")
    except _OTHER_VERSION:  # its logs lack our names, and nothing else
        logging.getLogger(LOG).debug("torch's logs could not be told the names of attncompile", exc_info=True)


def site_logger() -> logging.Logger:
    """Where the line for each site goes: torch's log for the artifact, below the log of sites."""
    register()
    try:
        from torch._logging._internal import getArtifactLogger

        return getArtifactLogger(SITE_LOG, SITES)
    except (ImportError, ValueError):  # not registered
        return logging.getLogger(SITE_LOG)


def why_again() -> str:
    """Why Dynamo compiles the graph at hand again, as ``TORCH_LOGS=recompiles`` has it; empty for the first time.

    Empty too in another version of torch, which keeps the reason elsewhere.
    """
    try:
        from torch._dynamo.utils import get_metrics_context

        compilation = get_metrics_context()
        said = compilation._metrics.get("recompile_reason") if compilation.in_progress() else None
        reason = (said or "").partition("\n")[0]
    except _OTHER_VERSION:
        logging.getLogger(LOG).debug("torch does not tell why it compiles again", exc_info=True)
        return ""
    number, _, rest = reason.partition(": ")  # of the graph whose guard failed
    return " ".join((rest if "/" in number else reason).split())


__all__ = ["LOG", "SITES", "SITE_LOG", "register", "site_logger", "why_again"]
