"""Metrics as columns, statistics, plots and a page."""
