"""Around the training loop: the run folder, metrics, progress on the terminal, the watchdog, requests to stop."""
