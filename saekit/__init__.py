"""saekit: sparse dictionaries for mechanistic interpretability.

Names load what they need when they are first used: ``import saekit`` loads nothing heavy, not even torch.
"""

import importlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

# torch's threads spin while they wait for work, and two jobs on the same cores then starve each other: a training
# beside another took 2.5 times as long, with short waits it takes 1.0. It must be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


if TYPE_CHECKING:
    from saekit import metrics as metrics
    from saekit.activations import Store as Store
    from saekit.autointerp.explain import explain as explain
    from saekit.circuits.constrained import constrained as constrained
    from saekit.circuits.places import Heads as Heads
    from saekit.circuits.places import Neurons as Neurons
    from saekit.circuits.targets import Feature as Feature
    from saekit.circuits.targets import Logit as Logit
    from saekit.circuits.targets import Target as Target
    from saekit.circuits.trace import trace as trace
    from saekit.dictionaries import Dictionary as Dictionary
    from saekit.dictionaries import calibrate as calibrate
    from saekit.dictionaries import create as create
    from saekit.dictionaries import prune as prune
    from saekit.evaluate import evaluate as evaluate
    from saekit.graph import Graph as Graph
    from saekit.graph.align import average as average
    from saekit.graph.files import load_graph as load_graph
    from saekit.harvest import harvest as harvest
    from saekit.hub import load as load
    from saekit.hub import save as save
    from saekit.hub.index import released as released
    from saekit.hub.publish import publish as publish
    from saekit.interventions import Edit as Edit
    from saekit.interventions import When as When
    from saekit.interventions import intervened as intervened
    from saekit.models import load_model as load_model
    from saekit.report import concepts as concepts
    from saekit.report import dashboard as dashboard
    from saekit.report import fires as fires
    from saekit.report import graph_contexts as graph_contexts
    from saekit.report import show as show
    from saekit.steer import Steering as Steering
    from saekit.steer import steer as steer
    from saekit.trainers import Trainer as Trainer
    from saekit.trainers import train as train
    from saekit.trainers import train_many as train_many
    from saekit.types import ActivationBatch as ActivationBatch
    from saekit.types import Codes as Codes
    from saekit.types import SaekitError as SaekitError

__version__ = "0.1.0"
_LAZY = {
    "ActivationBatch": "saekit.types",
    "Codes": "saekit.types",
    "Dictionary": "saekit.dictionaries",
    "SaekitError": "saekit.types",
    "Store": "saekit.activations",
    "Trainer": "saekit.trainers",
    "average": "saekit.graph.align",
    "calibrate": "saekit.dictionaries",
    "concepts": "saekit.report",
    "constrained": "saekit.circuits.constrained",
    "create": "saekit.dictionaries",
    "dashboard": "saekit.report",
    "evaluate": "saekit.evaluate",
    "explain": "saekit.autointerp.explain",
    "fires": "saekit.report",
    "graph_contexts": "saekit.report",
    "harvest": "saekit.harvest",
    "load": "saekit.hub",
    "load_model": "saekit.models",
    "prune": "saekit.dictionaries",
    "publish": "saekit.hub.publish",
    "released": "saekit.hub.index",
    "save": "saekit.hub",
    "show": "saekit.report",
    "steer": "saekit.steer",
    "Edit": "saekit.interventions",
    "Feature": "saekit.circuits.targets",
    "Graph": "saekit.graph",
    "Heads": "saekit.circuits.places",
    "Logit": "saekit.circuits.targets",
    "Neurons": "saekit.circuits.places",
    "Steering": "saekit.steer",
    "Target": "saekit.circuits.targets",
    "When": "saekit.interventions",
    "intervened": "saekit.interventions",
    "load_graph": "saekit.graph.files",
    "trace": "saekit.circuits.trace",
    "train": "saekit.trainers",
    "train_many": "saekit.trainers",
}
__all__ = ["__version__", "metrics", *_LAZY]


class _Facade(ModuleType):
    """Keeps ``saekit.harvest`` the function although ``saekit/harvest.py`` is a module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Facade

# From the root of a checkout, Python's path also offers our rooms under their bare names, which PyPI
# packages have: transformers would take our kernels/ for Hugging Face's. Only our own are hidden.
for _room in ("autointerp", "circuits", "kernels", "trainers"):
    _found = PathFinder.find_spec(_room)
    if _found and Path(_found.origin or "").resolve().parent.parent == Path(__file__).resolve().parent.parent:
        sys.modules.setdefault(_room, None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module("saekit.metrics")
    if name not in _LAZY:
        raise AttributeError(f"module 'saekit' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
