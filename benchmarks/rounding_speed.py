"""How fast rounding and packing are on this machine, and what they could be.

    python benchmarks/rounding_speed.py

Times the best of several calls; sizes in the rows' names. Writes
benchmarks/results/rounding_speed.csv, and what stands between README.md's two markers.
"""
