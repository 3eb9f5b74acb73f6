"""Routing for mixtures of experts as in DeepSeek-V3: which experts a token goes to, and with what weight.

``route`` is differentiable; ``route_backward`` is its gradient for those who schedule backward passes themselves.
``reference`` says the same in plain PyTorch.
"""

from .routing import ROWS_MULTIPLE, Routed, route, route_backward

__all__ = ["ROWS_MULTIPLE", "Routed", "route", "route_backward"]
