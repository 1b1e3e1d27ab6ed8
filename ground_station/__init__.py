"""What runs on the ground: broker, fleet state, coordinator of the experts, and the umbrella command.

Imports nothing by itself, so that `spacemoe --help` starts fast.
"""
