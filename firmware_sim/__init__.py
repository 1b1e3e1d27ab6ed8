"""What stands in for space and boards: physics of orbit, heat, battery and links; simulated boards; virtual satellites.

Imports nothing by itself. Leaves out whoever couples a satellite to a real board (the ground station's twin).
"""
