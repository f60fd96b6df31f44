"""Every job here reports quickly."""

from quick_reports import quick_reports

__all__ = ["quick_reports"]
