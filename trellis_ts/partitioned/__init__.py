"""Batch forecasts and backtests of folders of Parquet files, block by block, here or over a cluster."""
