"""Families of generators: how each learns and draws. A new one is a file and a line here."""

from jaxgen.families.base import Family
from jaxgen.families.flow import Flow

DEFAULT = Flow

__all__ = ["DEFAULT", "Family", "Flow"]
