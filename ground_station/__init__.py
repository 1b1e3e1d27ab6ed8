"""What runs on the ground: broker, fleet state, coordinator of the experts, and the umbrella command.

Imports nothing by itself, so that `spacemoe --help` starts fast.
"""

import os

# Some builds of onnxruntime report their use to the vendor and leave a file in the temporary folder: not from here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
