"""A neighbour that computes all the time and logs its throughput twice a second."""

import hashlib
import time

BLOCK = b"orlop" * 2000

while True:
    begin, rounds = time.monotonic(), 0
    while (elapsed := time.monotonic() - begin) < 0.5:
        hashlib.sha256(BLOCK).digest()
        rounds += 1
    print(f"time={time.time():.3f} rounds_per_second={rounds / elapsed:.0f}", flush=True)
