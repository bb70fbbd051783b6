"""Training: one loop that knows no architecture, and its plain parts."""

if __name__ != "saekit.trainers":
    raise ImportError("this folder is the package saekit.trainers: import it under that name (run python -P)")

from saekit.trainers.config import TrainConfig as TrainConfig
from saekit.trainers.config import read_config as read_config
from saekit.trainers.config import weights_digest as weights_digest
from saekit.trainers.finetune import finetune as finetune
from saekit.trainers.job import Run as Run
from saekit.trainers.loop import train as train
from saekit.trainers.loop import train_many as train_many
from saekit.trainers.trainer import Trainer as Trainer
