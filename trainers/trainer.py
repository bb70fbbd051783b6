"""One dictionary in training: a step is loss, backward, update, constraints, counts."""

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.dictionaries import Dictionary, TrainState
from saekit.dictionaries.objective.coefficient import PenaltyConfig
from saekit.harvest import ContinuedBatch
from saekit.kernels import serial
from saekit.trainers import dead, optim
from saekit.types import ActivationBatch, SaekitError

SMALL = (
    1 << 28
)  # multiplications of an encoder: below it two threads wait for each other longer than they help


def _check_endless(dictionary: Dictionary) -> None:
    """Raise where something would fall over a run whose length is unknown."""
    names = [name for name, _ in dictionary.config.objective]
    k_start = getattr(dictionary.config.selection[1], "k_start", None)
    steered = [
        name for name, c in dictionary.config.objective if isinstance(c, PenaltyConfig) and c.k is not None
    ]
    found = [
        *([f"k_start = {k_start}"] if k_start is not None else []),
        *(["objective 'p_annealed'"] if "p_annealed" in names else []),
        *(f"the L0 that {name!r} steers to" for name in steered),
    ]
    if found:
        raise SaekitError(f"steps is not given, and {found[0]} falls over the run; give steps=...")


class Trainer:
    """One dictionary in training. ``step`` takes a batch and returns metrics that stay on the device.

    Without :func:`train` it takes its normalisation from the first batch and, with ``steps`` left
    out, a constant rate after warm-up; what is annealed over the run then has no end, and is refused.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        lr: float | None = None,
        *,
        steps: int | None = None,
        warmup: int | None = None,
        decay: float = 0.3,
        clip: float | None = None,
        dead_after: int | None = None,
        optimizer: str = "adam",
        betas: tuple[float, ...] = optim.BETAS,
        resample_every: int | None = None,
        seed: int = 0,
        device: "str | torch.device | None" = None,
    ):
        self.dictionary = dictionary.to(device) if device else dictionary
        self.lr = lr if lr is not None else optim.learning_rate(dictionary.n_features, steps).value
        self.steps, self.decay, self.clip = steps, decay, clip
        self.warmup = warmup if warmup is not None else int(optim.warmup_steps(steps).value)
        self.dead_after = dead_after if dead_after is not None else dead.DEAD_AFTER
        self.resample_every, self.seed = resample_every, seed
        if resample_every is not None:
            dead.check_resampling(dictionary)
        if steps is None:
            _check_endless(dictionary)
        self.step_number = 0
        self.silent = torch.zeros(dictionary.n_features, dtype=torch.int64, device=dictionary.device)
        self.optimizer = optim.Adam(
            self.dictionary.parameters(), self.dictionary.unit_weights(), betas=betas,
            masked=optim.is_masked(optimizer),
        )  # fmt: skip

    def step(
        self,
        x: "Float[Tensor, 'batch *seq columns'] | ActivationBatch",
        *,
        peers: tuple[Tensor, ...] = (),
    ) -> dict[str, Tensor]:
        """One optimisation step on a batch of rows (of a transcoder: the columns read, then those written).

        ``peers`` are the decoders of dictionaries trained beside this one, for objectives that look at
        them; a ContinuedBatch brings the model behind it along.
        """
        downstream = None
        d = self.dictionary
        if isinstance(x, ContinuedBatch):
            downstream = x.downstream
        batch = d.gather([x])
        if 0 in getattr(batch, "shape", (1,)):
            raise SaekitError(f"batch has shape {tuple(batch.shape)}: it is empty; give at least one row")
        if self.step_number == 0 and not d.prepared:
            d.prepare(batch)
        rate = self.lr * optim.rate_factor(self.step_number, self.steps, self.warmup, self.decay)
        state = TrainState(self.step_number, self.steps, self.seed, self.dead, peers, downstream)
        # torch's threads would spin beside the kernels' own
        alone = d.device.type == "cpu" and downstream is None and d.wiring.kind != "sequences"
        with serial(1 if batch.numel() * d.n_features <= SMALL else None) if alone else nullcontext():
            return self._step(batch, rate, state)

    @property
    def dead(self) -> Bool[Tensor, " feature"]:
        """Which features count as dead."""
        return dead.dead(self.silent, self.dead_after)

    def _step(self, batch: Any, rate: float, state: TrainState) -> dict[str, Tensor]:
        d = self.dictionary
        with self.optimizer.collect() as factors:
            loss = d.loss(batch, state)
            loss.total.backward()
        self.optimizer.step(factors, rate, self.step_number + 1, self.clip)
        if not d.atoms.unit or d.mask is not None:  # those the optimizer has kept on the sphere
            d.after_step()
        d.observe(loss.codes, state)
        dead.update(self.silent, loss.codes.firing_counts(), loss.codes.rows)
        self.step_number += 1
        if self.resample_every is not None and self.step_number % self.resample_every == 0:
            dead.resample(d, self.dead, batch, state, self.optimizer)
            d.after_step()
            self.silent.masked_fill_(self.dead, 0)
        active = (loss.codes.values != 0).sum() / loss.codes.rows
        out = {"loss": loss.total.detach(), **{k: v.detach() for k, v in loss.terms.items()}}
        share = state.dead.float().mean() if state.dead is not None else torch.zeros(())
        return {**out, "fvu": loss.fvu, "l0": active, "dead_share": share, "lr": torch.tensor(rate)}

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on."""
        out = {f"dictionary.{k}": v for k, v in self.dictionary.state_dict().items()}
        out["silent"] = self.silent
        for i, (m, v) in enumerate(self.optimizer.moments):
            out[f"optimizer.{i}.m"], out[f"optimizer.{i}.v"] = m, v
        return out

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take the state of :meth:`state` back."""
        own = {k.removeprefix("dictionary."): v for k, v in tensors.items() if k.startswith("dictionary.")}
        self.dictionary.load_state_dict(own)
        self.silent.copy_(tensors["silent"])
        for i, (m, v) in enumerate(self.optimizer.moments):
            m.copy_(tensors[f"optimizer.{i}.m"])
            v.copy_(tensors[f"optimizer.{i}.v"])
        self.step_number = step
