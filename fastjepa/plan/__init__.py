"""`fastjepa plan`: which ZeRO stage and micro batch for a model on a number of GPUs."""
