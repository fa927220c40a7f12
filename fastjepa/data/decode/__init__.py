"""From the bytes of image files to pixels. The only room that knows DALI."""
