"""Families of generators: how each learns and draws. A new one is a file and a line here."""

from jaxgen.families.adversarial import Adversarial
from jaxgen.families.autoencoder import Autoencoder
from jaxgen.families.autoencoder_kl import AutoencoderKL
from jaxgen.families.autoregressive import Autoregressive
from jaxgen.families.base import Family
from jaxgen.families.ddpm import DDPM
from jaxgen.families.dmd import DMD
from jaxgen.families.flow import Flow
from jaxgen.families.gan import Gan
from jaxgen.families.onestep import OneStep
from jaxgen.families.vae import Vae

DEFAULT = Flow

__all__ = [
    "DDPM",
    "DEFAULT",
    "DMD",
    "Adversarial",
    "Autoencoder",
    "AutoencoderKL",
    "Autoregressive",
    "Family",
    "Flow",
    "Gan",
    "OneStep",
    "Vae",
]
