"""Runs that compare settings: the papers' ablations, and synthetic tests."""
