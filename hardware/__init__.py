"""Everything between a bundle and a real board: images, first boot, flashing, what is known of boards.

See hardware/README.md. What runs on the board itself is node_agent.
"""
