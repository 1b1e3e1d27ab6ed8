"""Everything between a bundle and a real board: images, first boot, flashing. Holds nothing yet but this page.

See hardware/README.md for what will be here and what was found out about it.
"""
