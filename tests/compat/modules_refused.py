"""Modules that the strategy refuses, or may."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(inputs: int, outputs: int, depth: int = 5) -> nn.Sequential:
    layers = [m for i in range(depth) for m in (nn.Linear(inputs if i == 0 else 8, 8), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Linear(8, outputs))


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class GAN(LightningModule):
    """GAN: manual optimization, two optimizers, `toggle_optimizer`."""

    def __init__(self, latent_dim: int = 4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim = latent_dim
        self.generator, self.discriminator = mlp(latent_dim, 8), mlp(8, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def adversarial_loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        optimizer_g, optimizer_d = self.optimizers()  # type: ignore[attr-defined, misc]
        z = torch.randn(real.shape[0], self.latent_dim).type_as(real)
        valid, fake = torch.ones(real.size(0), 1).type_as(real), torch.zeros(real.size(0), 1).type_as(real)
        self.toggle_optimizer(optimizer_g)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)
        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(real), valid)
        d_loss = (real_loss + self.adversarial_loss(self.discriminator(self(z).detach()), fake)) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.discriminator(batch[0]).mean())

    def configure_optimizers(self) -> Any:
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        return [opt_g, opt_d], []


class SeveralOptimizers(Classifier):
    """Several optimizers with automatic optimization, which Lightning 2 refuses itself."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[:4].parameters(), 0.1), torch.optim.SGD(self.net[4:].parameters(), 0.01)]


class ManualOptimization(Classifier):
    """Manual optimization with one optimizer and clipping by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]


class SecondOrder(Classifier):
    """LBFGS."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class SkipsSteps(Classifier):
    """`training_step` returns `None` for batches without enough positives."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % 3 == 2:
            return None
        return super().training_step(batch, batch_idx)


class GradientPenalty(Classifier):
    """`torch.autograd.grad` with respect to the input in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x = x.requires_grad_()
        logits = self.net(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        loss = F.cross_entropy(logits, y) + 0.1 * ((gradient.norm(2, dim=1) - 1) ** 2).mean()
        self.log("train_loss", loss)
        return loss


class MeanTeacher(LightningModule):
    """Mean teacher: an average of the student's weights, updated in `on_train_batch_end`, gives targets."""

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.student = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 4))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.student(x)
        with torch.no_grad():
            target = self.teacher(x + 0.01).softmax(-1)
        loss = F.cross_entropy(logits, y) + F.mse_loss(logits.softmax(-1), target)
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
                slow.mul_(self.momentum).add_(fast, alpha=1 - self.momentum)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.teacher(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)
