"""Pages that a person reads: single self-contained HTML files."""

from saekit.report.graph_contexts import graph_contexts as graph_contexts
from saekit.report.run import dashboard as dashboard
