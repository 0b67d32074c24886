"""Transfer learning for medical imaging that people can trust with patients.

::

    scans ─▶ studies ─▶ dataset ─▶ model ─▶ evaluation ─▶ report
                                     │            └─────▶ registry

Each arrow is a record of :mod:`medtl.records`; each noun is a package of this one; the verbs that join them are in
``pipelines``. Importing this package imports neither torch nor monai.
"""

from importlib.metadata import PackageNotFoundError, version

from medtl.config import Config, load_config
from medtl.errors import MedtlError

try:
    __version__ = version("medtl")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Config", "MedtlError", "__version__", "load_config"]
