"""Time of loading: JPEG files to batches beside a torch DataLoader (__main__), listing of large data sets (listing)."""
