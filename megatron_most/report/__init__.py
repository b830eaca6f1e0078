"""Self-contained HTML pages: the report of one run, or the comparison of several."""

from megatron_most.report.comparison import write_comparison
from megatron_most.report.page import write_report

__all__ = ["write_comparison", "write_report"]
