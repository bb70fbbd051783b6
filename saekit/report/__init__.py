"""Pages that a person reads: single self-contained HTML files, and what a notebook shows."""

from saekit.report.concepts import concepts as concepts
from saekit.report.graph_contexts import graph_contexts as graph_contexts
from saekit.report.run import dashboard as dashboard
from saekit.report.show import fires as fires
from saekit.report.show import show as show
