"""Ways of choosing the visual features that later layers keep: one file for each, `table.py` lists them."""
