"""The gRPC transport: the only folder of the server that knows protocol buffers and statuses."""
