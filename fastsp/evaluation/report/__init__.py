"""`report.html` of a run: the page, its tables and charts, and the paper's figures beside ours."""

from fastsp.evaluation.report.page import write_report

__all__ = ["write_report"]
