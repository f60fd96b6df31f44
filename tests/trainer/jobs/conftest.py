"""Every job here reports quickly."""

from jobs import quick_reports

__all__ = ["quick_reports"]
