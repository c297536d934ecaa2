"""What any transport needs to serve an engine; `grpc/` is the one transport so far. No torch, and gRPC only there."""
