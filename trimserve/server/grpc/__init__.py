"""The gRPC transport: protocol buffers, statuses and channels are known here and nowhere below."""
