"""Dictionaries on disk: one file per format."""

from saekit.hub.native import load as load
from saekit.hub.native import save as save
