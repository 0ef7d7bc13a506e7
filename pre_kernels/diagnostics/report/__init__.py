"""The report: columns for metrics, statistics over seeds, plots, and the HTML page."""
