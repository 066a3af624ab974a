"""Time-series forecasting with Trellis."""
