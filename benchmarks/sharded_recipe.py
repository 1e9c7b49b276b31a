"""The usual recipe for sharded models beside groundplan, under FSDP2 in two processes: how many tensors are not eager's.

The recipe is what the documentation of PyTorch and of Lightning Fabric says: construct on the meta device, `fully_shard`,
`to_empty`, then every `reset_parameters`. Fresh memory is filled with a pattern, so that what nobody initializes shows on every
machine. The models are the small ones of the tests; what differs does not depend on their size.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from common import print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.layouts import launch


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = launch(2, Path(folder), "recipe")
    rows = ranks[0]["recipe"]
    assert all(rank["recipe"] == rows for rank in ranks)
    print_table(rows, markdown=True)
    print(json.dumps({"benchmark": Path(__file__).stem, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
