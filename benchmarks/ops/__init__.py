"""Times the compiled ops; `benchmarks/bench_ops.py` is the program."""
