"""Train a unified model: ``python train_unified_generation.py --model_path M --train_data_path data.jsonl
...``

The same as ``unigen train``; ``torchrun --nproc_per_node=N train_unified_generation.py ...`` trains on N
devices.
"""

import sys

from unigen.cli import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
