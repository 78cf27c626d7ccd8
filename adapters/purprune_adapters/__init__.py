"""Adapters that put purprune's pure core into training loops and onto Apple devices."""

from purprune_adapters.pruner import Pruner as Pruner
from purprune_adapters.report import Report as Report
from purprune_adapters.report import ReportRow as ReportRow
from purprune_adapters.resolve import resolve as resolve
