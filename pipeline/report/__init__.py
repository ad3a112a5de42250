"""The cohort's report: one self-contained HTML page."""

from pipeline.report.page import write_report

__all__ = ["write_report"]
