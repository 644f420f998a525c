"""Evidence: comparisons, derived tolerances, certificates."""

from attncompile.verify.certificate import (
    Certificate,
    EndToEnd,
    SiteCase,
    SiteCertificate,
    load_certificate,
    measured,
    save_certificate,
    tool_versions,
)
from attncompile.verify.compare import (
    Comparison,
    MismatchError,
    compare,
    require_as_good_as_eager,
    require_within,
)
from attncompile.verify.sites import DRAWS, Draw, check_site, refused_site
from attncompile.verify.tolerance import Tolerance, derive_tolerance

__all__ = [
    "DRAWS", "Certificate", "Comparison", "Draw", "EndToEnd", "MismatchError", "SiteCase", "SiteCertificate",
    "Tolerance", "check_site", "compare", "derive_tolerance", "load_certificate", "measured", "refused_site",
    "require_as_good_as_eager", "require_within", "save_certificate", "tool_versions",
]
