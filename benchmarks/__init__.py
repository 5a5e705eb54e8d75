"""Measurements: `scripts/sandbox .venv/bin/python -m benchmarks.NAME`. They print, and judge nothing by a clock."""
