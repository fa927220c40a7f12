"""The methods of pretraining, one room each, behind the contract of `fastjepa.objectives.base`."""
