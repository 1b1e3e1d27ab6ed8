"""What runs on a board: expert shards behind a data plane, telemetry in front of a control plane.

Imports nothing by itself, so that a board starts fast. Contract modules that other rooms may import:
`wire`, `frame`, `compress`, `partial`, `routing`, `shard` (standard library and numpy only).
"""

import os

# Some builds of onnxruntime report their use to the vendor and leave a file in the temporary folder: not from here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
