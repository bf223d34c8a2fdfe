"""Speed and memory compared with peers and with the floor, as ratios within one run: `python -m benchmarks`."""
