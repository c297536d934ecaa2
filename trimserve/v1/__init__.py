"""Generated from protos/trimserve/v1 by scripts/generate_protos.py; never edited."""
