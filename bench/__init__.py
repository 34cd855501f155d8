"""Measurements. Each script prints a table and writes bench/results/<name>.json (see record.py)."""
