"""The small mixture-of-experts reference model: its text, training and export."""
