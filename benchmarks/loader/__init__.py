"""What it costs to turn JPEG files into batches: fastjepa.data.Loader beside a torch DataLoader (see __main__)."""
