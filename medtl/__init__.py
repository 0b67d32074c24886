"""Transfer learning for medical imaging that people can trust with patients.

::

    scans ─▶ studies ─▶ dataset ─▶ model ─▶ evaluation ─▶ report
                                     │            └─────▶ registry

Each arrow is a record of :mod:`medtl.records`; each noun is a package of this one; the verbs that join them are in
``pipelines``. Importing this package imports neither torch nor monai.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medtl.config import Config, load_config
    from medtl.errors import MedtlError

    __version__: str

__all__ = ["Config", "MedtlError", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    """Import on first use: the process that decodes pixels starts many times and needs none of this."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("medtl")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    if name in ("Config", "load_config"):
        from medtl import config

        return getattr(config, name)
    if name == "MedtlError":
        from medtl.errors import MedtlError

        return MedtlError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
