"""Every error that medtl raises on purpose, as one tree.

::

    MedtlError                exit 1   a run cannot go on; the message says what, where and what to try
    ├── ConfigError           exit 2   the YAML file, an override or a command line is wrong
    ├── StorageError          exit 1   the workspace cannot be read, written or trusted
    │   └── TamperedError     exit 1   bytes on disk are not the bytes that were written
    ├── ScanError             exit 1   one file cannot become a scan; carries a reason code, becomes an Exclusion
    ├── StudyError            exit 1   the label table does not fit the scans
    ├── SplitError            exit 1   a split would share a patient, or a part would be empty
    ├── PlanError             exit 1   the training part cannot be planned for
    ├── WeightsError          exit 1   weights are missing, altered or of another architecture
    ├── ModelError            exit 1   training broke a promise (a frozen layer moved, a loss is not finite)
    └── GateRefused           exit 3   the run is complete and its release was refused by the gate

A bad *item* is a value (:class:`medtl.records.Exclusion`), a bad *run* is one of these. No message holds a patient's
name, a raw identifier or the name of a scan's file.
"""

from __future__ import annotations


class MedtlError(Exception):
    """A run cannot go on."""

    exit_code = 1


class ConfigError(MedtlError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class StorageError(MedtlError):
    """The workspace cannot be read or written."""


class TamperedError(StorageError):
    """Bytes on disk differ from the bytes that were written."""


class ScanError(MedtlError):
    """One file cannot become a scan.

    Args:
        code: reason code, the key under which the exclusion is counted.
        reason: one sentence for a person, without names, identifiers or paths.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason

    def __reduce__(self) -> tuple[type[ScanError], tuple[str, str]]:
        return type(self), (self.code, self.reason)


class StudyError(MedtlError):
    """The label table does not fit the scans."""


class SplitError(MedtlError):
    """A split would share a patient, or one of its parts would be empty."""


class PlanError(MedtlError):
    """The training part cannot be planned for."""


class WeightsError(MedtlError):
    """Weights are missing, altered or of another architecture."""


class ModelError(MedtlError):
    """Training broke one of its promises."""


class GateRefused(MedtlError):
    """The run is complete and its release was refused by the gate."""

    exit_code = 3
