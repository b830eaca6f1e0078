"""One self-contained HTML page that shows what a run did."""

from megatron_most.report.page import write_report

__all__ = ["write_report"]
