"""From the bytes of image files to pixels. This is the only room that knows DALI."""
