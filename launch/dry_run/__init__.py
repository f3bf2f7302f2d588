"""What a job would need and send, without running it."""
