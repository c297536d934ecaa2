"""Generated from protos/trimserve/v1 by scripts/generate/protos.py; never edited."""
