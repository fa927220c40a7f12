"""What a run leaves behind and how it is watched: its folder, metrics, progress, watchdog, requests to stop."""
