"""Metrics, paired bootstrap intervals, tables, charts and the HTML report."""
