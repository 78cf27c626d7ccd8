"""Errors of the Core ML export."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .records import Verification
    from .report import ExportReport

__all__ = ["ExportError", "VerificationError"]


class ExportError(RuntimeError):
    """The conversion itself failed; the message carries what the converter printed."""


class VerificationError(ExportError):
    """The saved package is not the model: a weight is missing, was lost, or an output differs.

    Attributes:
        report: everything that was found before the error, as an ``ExportReport`` (from
            ``export_coreml``) or a ``Verification`` (from ``verify_coreml``).
    """

    def __init__(self, message: str, report: ExportReport | Verification | None = None) -> None:
        """Keep the report beside the message."""
        super().__init__(message)
        self.report = report
