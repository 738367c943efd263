"""Modules that reconstruct, generate or compare: autoencoders, diffusion, contrastive learning."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F


def draw(shape: Any, batch_idx: int, deterministic: bool) -> Tensor:
    """Normal noise, which depends on the batch alone if asked."""
    generator = torch.Generator().manual_seed(batch_idx) if deterministic else None
    return torch.randn(shape, generator=generator)


class VAENet(nn.Module):
    def __init__(self, width: int = 12, latent: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc_mu, self.fc_var = nn.Linear(width, latent), nn.Linear(width, latent)
        self.decoder_input = nn.Linear(latent, width)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x.flatten(1))
        return self.fc_mu(h), self.fc_var(h)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.decoder_input(z)).view(-1, 1, 8, 8)


class VAE(LightningModule):
    """VAE: methods `encode` and `decode`, noise drawn in the step, KL term right after the encoder."""

    def __init__(self, kl_coeff: float = 0.1, deterministic: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = VAENet()

    def step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, _ = batch
        mu, log_var = self.model.encode(x)
        kl = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)
        eps = draw(mu.shape, batch_idx, self.hparams["deterministic"]).type_as(mu)
        z = mu + torch.exp(0.5 * log_var) * eps
        recon_loss = F.mse_loss(self.model.decode(z), x, reduction="mean")
        loss = self.hparams["kl_coeff"] * kl + recon_loss
        return loss, {"recon_loss": recon_loss, "kl": kl, "loss": loss}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, logs = self.step(batch, batch_idx)
        self.log_dict({f"train_{k}": v for k, v in logs.items()}, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, logs = self.step(batch, batch_idx)
        self.log_dict({f"val_{k}": v for k, v in logs.items()})
        return loss

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.model.decode(self.model.encode(batch[0])[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Denoiser(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.conv_in = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.times = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.conv_out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(self.width // 2, device=x.device) * 0.5)
        angles = t[:, None] * frequencies[None, :]
        emb = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
        h = self.conv_in(x)
        for block, time in zip(self.blocks, self.times):
            h = h + F.silu(block(h) + time(emb)[:, :, None, None])
        return self.conv_out(h)


class Diffusion(LightningModule):
    """DDPM: timesteps and noise drawn in the step, schedule in buffers of the LightningModule."""

    sqrt_alphas: Tensor
    sqrt_one_minus: Tensor

    def __init__(self, timesteps: int = 50, deterministic: bool = False) -> None:
        super().__init__()
        self.deterministic, self.timesteps = deterministic, timesteps
        self.model = Denoiser()
        alphas_cumprod = np.cumprod(1.0 - np.linspace(1e-4, 0.05, timesteps))
        self.register_buffer("sqrt_alphas", torch.tensor(np.sqrt(alphas_cumprod), dtype=torch.float32))
        self.register_buffer("sqrt_one_minus", torch.tensor(np.sqrt(1 - alphas_cumprod), dtype=torch.float32))

    def p_losses(self, x: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch_idx) if self.deterministic else None
        t = torch.randint(0, self.timesteps, (x.shape[0],), generator=generator).to(self.device)
        noise = draw(x.shape, batch_idx, self.deterministic).to(self.device)
        scale, sigma = (b[t].view(-1, 1, 1, 1) for b in (self.sqrt_alphas, self.sqrt_one_minus))
        return F.mse_loss(self.model(scale * x + sigma * noise, t), noise)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.p_losses(batch[0], batch_idx)
        self.log("train/loss", loss, prog_bar=True)
        self.log("global_step", float(self.global_step), on_step=True)
        self.log("lr_abs", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.p_losses(batch[0], batch_idx), on_epoch=True)

    test_step = validation_step

    @torch.no_grad()
    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = draw(batch[0].shape, batch_idx, True)
        for step in (40, 20, 0):
            t = torch.full((x.shape[0],), step, device=self.device)
            x = (x - self.sqrt_one_minus[step] * self.model(x, t)) / self.sqrt_alphas[step]
        return x

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 6))
        return [optimizer], [{"scheduler": warmup, "interval": "step", "frequency": 1}]


class SimCLR(LightningModule):
    """SimCLR: two views concatenated through encoder and projector, NT-Xent loss, top-1 logged."""

    def __init__(self, hidden_dim: int = 8, temperature: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.convnet = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32, 4 * hidden_dim),
        )  # fmt: skip
        self.projector = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4 * hidden_dim, hidden_dim))

    def info_nce_loss(self, batch: Any, mode: str = "train") -> Tensor:
        imgs, _ = batch
        imgs = torch.cat(imgs, dim=0)
        feats = self.projector(self.convnet(imgs))
        cos_sim = F.cosine_similarity(feats[:, None, :], feats[None, :, :], dim=-1)
        self_mask = torch.eye(cos_sim.shape[0], dtype=torch.bool, device=cos_sim.device)
        cos_sim.masked_fill_(self_mask, -9e15)
        pos_mask = self_mask.roll(shifts=cos_sim.shape[0] // 2, dims=0)
        cos_sim = cos_sim / self.hparams["temperature"]
        nll = (-cos_sim[pos_mask] + torch.logsumexp(cos_sim, dim=-1)).mean()
        self.log(mode + "_loss", nll)
        comb_sim = torch.cat([cos_sim[pos_mask][:, None], cos_sim.masked_fill(pos_mask, -9e15)], dim=-1)
        sim_argsort = comb_sim.argsort(dim=-1, descending=True).argmin(dim=-1)
        self.log(mode + "_acc_top1", (sim_argsort == 0).float().mean())
        self.log(mode + "_acc_mean_pos", 1 + sim_argsort.float().mean())
        return nll

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.info_nce_loss(batch, mode="train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.info_nce_loss(batch, mode="val")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.001)
        return [optimizer], [lr_scheduler]


class Siamese(LightningModule):
    """Siamese network: the same network called twice in a step, contrastive loss."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin
        self.encoder = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 4))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(a), self.encoder(b)

    def contrastive(self, batch: Any) -> Tensor:
        a, b, same = batch
        distance = F.pairwise_distance(*self(a, b))
        return (same * distance**2 + (1 - same) * F.relu(self.margin - distance) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.contrastive(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.contrastive(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.contrastive(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.pairwise_distance(*self(batch[0], batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SimSiam(LightningModule):
    """SimSiam: encoder, projector, predictor called for each view, stop-gradient by `detach`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.projection_head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
        self.prediction_head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.backbone(x).flatten(start_dim=1)
        z = self.projection_head(f)
        p = self.prediction_head(z)
        z = z.detach()
        return z, p

    def shared(self, batch: Any) -> Tensor:
        (x0, x1), _ = batch
        z0, p0 = self.forward(x0)
        z1, p1 = self.forward(x1)
        return -0.5 * (F.cosine_similarity(z0, p1).mean() + F.cosine_similarity(z1, p0).mean())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.shared(batch)
        self.log("train_loss_ssl", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss_ssl", self.shared(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class CLIP(LightningModule):
    """CLIP: an image and a text tower, `logit_scale` as a parameter of the LightningModule."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU())
        self.visual_proj = nn.Linear(16, width, bias=False)
        self.token_embedding = nn.Embedding(18, width)
        self.text = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU())
        self.text_proj = nn.Linear(16, width, bias=False)
        self.logit_scale = nn.Parameter(torch.ones([]) * np.log(1 / 0.07))

    def encode_image(self, image: Tensor) -> Tensor:
        return F.normalize(self.visual_proj(self.visual(image)), dim=-1)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        return F.normalize(self.text_proj(self.text(self.token_embedding(input_ids)).mean(dim=1)), dim=-1)

    def step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        image, text = self.encode_image(batch["image"]), self.encode_text(batch["input_ids"])
        logits = self.logit_scale.exp() * image @ text.t()
        labels = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
        return loss, (logits.argmax(1) == labels).float().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, acc = self.step(batch)
        self.log("train_loss", loss)
        self.log("train_acc", acc, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, acc = self.step(batch)
        self.log_dict({"val_loss": loss, "val_acc": acc}, batch_size=len(batch["image"]))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"image": self.encode_image(batch["image"]), "text": self.encode_text(batch["input_ids"])}

    def configure_optimizers(self) -> Any:
        exclude = [p for n, p in self.named_parameters() if p.ndim < 2 or "logit_scale" in n]
        include = [p for n, p in self.named_parameters() if not (p.ndim < 2 or "logit_scale" in n)]
        groups = [{"params": exclude, "weight_decay": 0.0}, {"params": include, "weight_decay": 0.2}]
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)
