"""Runs what the engine plans: weights, pages of KV and features are held here, and tokens are drawn."""
