"""What runs, where it is cut, and what follows from that."""

from lightning_dgmp.plan.cut import PlanError
from lightning_dgmp.plan.plan import Plan, make_plan
from lightning_dgmp.plan.trace import trace_step

__all__ = ["Plan", "PlanError", "make_plan", "trace_step"]
