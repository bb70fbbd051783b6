"""Wirings: what a dictionary reads and what it writes."""

from saekit.registry import Registry

WIRINGS = Registry("wiring", {"autoencoder": "saekit.dictionaries.wiring.autoencoder:Autoencoder"})
