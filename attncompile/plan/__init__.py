"""Plans: what is done to every site, and the work it takes."""

from attncompile.plan.cost import CostRow, Work, cost_row, work
from attncompile.plan.schema import Plan, Refused, SitePlan, load_plan, save_plan

__all__ = ["CostRow", "Plan", "Refused", "SitePlan", "Work", "cost_row", "load_plan", "save_plan", "work"]
