"""Decodes the bytes of image files into pixels. This is the only room that knows DALI."""
