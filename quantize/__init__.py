"""Quantise mixture-of-experts models by expert importance, and evaluate the result."""

import os

# Some builds of onnxruntime report their use to the vendor and leave a file in the temporary folder: not from here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
