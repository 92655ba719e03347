"""Bytes to values and back, on NumPy alone: the normative layouts, each described where its functions are."""
