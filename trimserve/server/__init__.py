"""The gRPC server: protocol buffers, statuses and metrics live here and nowhere below."""
