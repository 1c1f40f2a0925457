"""A page about a user's own data under the configuration at hand, before anything trains."""

from latentdm.report.findings import Findings, look
from latentdm.report.page import page, write

__all__ = ["Findings", "look", "page", "write"]
