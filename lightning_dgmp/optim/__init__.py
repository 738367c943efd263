"""Optimizers that tolerate delayed gradients."""

from lightning_dgmp.optim.rotated import RotatedAdamW

__all__ = ["RotatedAdamW"]
