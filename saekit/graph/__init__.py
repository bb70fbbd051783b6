"""Attribution graphs as data: what each node adds to the value of another. No model."""

from saekit.graph.align import average as average
from saekit.graph.data import KINDS as KINDS
from saekit.graph.data import Graph as Graph
from saekit.graph.data import Nodes as Nodes
