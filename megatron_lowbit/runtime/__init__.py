"""Processes: ranks, rendezvous, signals, locks and metrics of distributed jobs."""
