"""Dictionaries: four choices (wiring, selection, atoms, objective), each a table of small files."""

from saekit.dictionaries.config import Config as Config
from saekit.dictionaries.dictionary import Dictionary as Dictionary
from saekit.dictionaries.kinds import build as build
from saekit.dictionaries.presets import PRESETS as PRESETS
from saekit.dictionaries.presets import create as create
from saekit.dictionaries.start import from_weights as from_weights
from saekit.dictionaries.start import warm_start as warm_start
from saekit.dictionaries.surgery import calibrate as calibrate
from saekit.dictionaries.surgery import duplicates as duplicates
from saekit.dictionaries.surgery import merge as merge
from saekit.dictionaries.surgery import prune as prune
from saekit.dictionaries.surgery import with_objective as with_objective
from saekit.dictionaries.training import TrainState as TrainState
