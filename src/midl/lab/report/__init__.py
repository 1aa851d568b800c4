"""The report of a sweep: claims with verdicts, tables and charts, as one HTML page and as Markdown."""

from midl.lab.report.page import to_html, to_report_markdown, update_markdown
from midl.lab.report.records import Results, read_results

__all__ = ["Results", "read_results", "to_html", "to_report_markdown", "update_markdown"]
