"""The cohort's report: one HTML page that needs nothing but itself."""

from pipeline.report.page import write_report

__all__ = ["write_report"]
