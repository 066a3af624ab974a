"""Forecasts of live series: each observation costs the same, and what is remembered has a fixed size."""
