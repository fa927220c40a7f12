"""Parameter groups, schedules, and AdamW that also updates the EMA of the weights."""
