"""Exporting pruned models to Core ML, and proving what was exported.

Importing this package doesn't import coremltools; calling ``export_coreml`` does.
"""

from .errors import ExportError as ExportError
from .errors import VerificationError as VerificationError
from .evaluate import UnknownOpError as UnknownOpError
from .evaluate import evaluate_coreml as evaluate_coreml
from .export import export_coreml as export_coreml
from .numeric import NumericalCheck as NumericalCheck
from .records import ParameterRecord as ParameterRecord
from .records import Verification as Verification
from .report import ExportReport as ExportReport
from .verify import verify_coreml as verify_coreml

__all__ = [
    "ExportError",
    "ExportReport",
    "NumericalCheck",
    "ParameterRecord",
    "UnknownOpError",
    "Verification",
    "VerificationError",
    "evaluate_coreml",
    "export_coreml",
    "verify_coreml",
]
