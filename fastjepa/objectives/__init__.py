"""What is learnt: one room per method, behind the contract of `fastjepa.objectives.base`."""
