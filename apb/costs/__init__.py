"""Costs: time, bytes and memory of a plan on given devices and a given network, without running it."""

from apb.costs.cost import Cost, cost
from apb.costs.network import Network
from apb.costs.rates import Rates, assumed, load

__all__ = ["Cost", "Network", "Rates", "assumed", "cost", "load"]
