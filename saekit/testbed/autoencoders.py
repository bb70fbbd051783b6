"""Autoencoders of the digits with a bottleneck, of as many images as are given."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

HIDDEN, STEPS, BATCH, LR, DECAY = 128, 3000, 64, 1e-3, 0.1
NOISE = 0.07  # of the pixels that are encoded in training; with none, steps in some directions lead ever further away


class Autoencoder(nn.Module):
    """64 pixels, ``HIDDEN`` ReLU units, ``latent`` coordinates, and back; pixels come back in 0..1."""

    def __init__(self, latent: int, generator: torch.Generator):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, latent))
        self.decode = nn.Sequential(nn.Linear(latent, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64), nn.Sigmoid())
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 * ("weight" in name))

    def forward(self, x: Float[Tensor, "rows 64"]) -> Float[Tensor, "rows 64"]:
        """The images as they come back."""
        return self.decode(self.encode(x))

    def step(self, z: Float[Tensor, "rows latent"]) -> Float[Tensor, "rows latent"]:
        """f(z) = E(D(z)): the code of the image of a code."""
        return self.encode(self.decode(z))


def autoencoder(images: Float[Tensor, "rows 64"], latent: int, seed: int, steps: int = STEPS) -> Autoencoder:
    """One that learnt these images, with normal ``NOISE`` on what is encoded, by mean squared error under weight decay (AdamW), in ``steps`` batches."""
    g = torch.Generator().manual_seed(seed)
    net = Autoencoder(latent, g)
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=DECAY)
    for _ in range(steps):
        x = images[torch.randint(len(images), (BATCH,), generator=g)]
        loss = nn.functional.mse_loss(net(x + NOISE * torch.randn(x.shape, generator=g)), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)
