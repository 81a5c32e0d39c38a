"""The library in ten lines: plan, look, run.

python examples/convert.py CHECKPOINT OUTPUT [EXPERT=ALPHA ...]
"""

import sys

import bridge

source, destination, *pairs = sys.argv[1:]
alphas = {expert: float(alpha) for expert, _, alpha in (pair.partition("=") for pair in pairs)}

plan = bridge.plan(source, destination, to="torch-merged", lora_alpha=alphas or None)
print(plan)

result = plan.run(progress=lambda done, total: print(f"\r{done / total:4.0%}", end="", file=sys.stderr))
print(f"{result.tensors} tensors in {result.seconds:.2f} s, checksum {result.checksum}")
