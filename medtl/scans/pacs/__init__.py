"""Scans over the network: a port where others send them, and an archive from which they are fetched.

::

    listen  (C-STORE) ─────────────────────────────────┐
    fetch ─▶ query ─▶ dimse (C-FIND, C-GET, C-MOVE)  ──┼─▶ spool: a folder of whole DICOM files
                    └▶ dicomweb (QIDO-RS, WADO-RS)   ──┘

What is acknowledged is on the disk. Message length, object size, time, memory and the disk's free space are bounded.
An object that is refused is counted with a code, and the others go on. No log line, no error and no name of a file
holds an identifier.
"""

from medtl.errors import ConfigError

try:
    import pynetdicom  # noqa: F401
    import requests  # noqa: F401
except ImportError as error:
    raise ConfigError("scans.pacs needs more packages. Install them: pip install 'medtl[pacs]'") from error
