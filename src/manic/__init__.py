"""manic: wrap the optimizer you have, and never tune its learning rate again (Mechanic, arXiv 2306.00144)."""

from manic.chains import chain
from manic.mechanic import Mechanic, is_mechanized, mechanize

__version__ = "0.2.0"
__all__ = ["Mechanic", "chain", "is_mechanized", "mechanize"]
