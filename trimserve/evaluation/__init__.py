"""What trimming costs: questions asked untrimmed and trimmed, of a model in this process or of a running server."""
