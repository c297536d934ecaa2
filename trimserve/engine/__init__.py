"""Several requests generate together: scheduling, KV, sampling, text."""
