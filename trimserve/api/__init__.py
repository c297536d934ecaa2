"""What goes in and what comes out, as plain frozen data that every other part may import; no torch, no protobuf."""
