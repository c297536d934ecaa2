"""trimserve serves Llama-3.2-Vision over gRPC and keeps only the visual features that the text attends to."""

__version__ = "0.1.0"
