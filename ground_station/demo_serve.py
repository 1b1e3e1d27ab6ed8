"""What `spacemoe demo --serve` does after its text: the same boards serve page and API until Ctrl-C.

Leaves out the demo itself (demo.py) and the token engine (engine.py).
"""

from __future__ import annotations

import threading

from ground_station.mission_up import Running
from ground_station.serving import Serving
from ground_station.serving_engine import serving_api
from ground_station.text_stream import Show


def hold(watch: Running, made: Serving, show: Show) -> None:
    """Returns by an exception alone, such as KeyboardInterrupt."""
    with serving_api(made, watch.mission, watch.api):
        show(
            f"\npage: {watch.served.url}  API: {watch.served.url}v1 (model {made.model.manifest.name}); Ctrl-C ends it\n"
        )
        threading.Event().wait()
