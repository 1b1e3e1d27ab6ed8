"""Simulated boards: a board's power and temperature as kernel-format sensor files that stock node agents read.

Imports nothing by itself. Leaves out, so far: orbit, battery, links and the virtual satellite.
"""
