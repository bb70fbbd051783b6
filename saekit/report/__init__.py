"""Pages that a person reads: single self-contained HTML files."""

from saekit.report.run import dashboard as dashboard
