"""What came of a study: one self-contained HTML file, and a table for the terminal."""

from bitlaw.report.page import write_report
from bitlaw.report.terminal import table

__all__ = ["table", "write_report"]
