"""`fastjepa plan` recommends a ZeRO stage and a micro batch for a model on a number of GPUs."""
