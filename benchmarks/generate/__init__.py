"""Times the model without engine and service; `benchmarks/bench_generate.py` is the program."""
