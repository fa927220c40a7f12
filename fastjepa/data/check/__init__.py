"""`fastjepa check`: look at every image of a data set before it is trained on."""
