"""Speed and memory beside peers and beside the floor, as ratios within one run: `python -m benchmarks`."""
