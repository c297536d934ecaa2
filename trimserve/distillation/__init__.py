"""`trimserve train-compressor`: trains what a policy has to learn, on a frozen model and its own answers."""
