"""Parameter groups, schedules, and AdamW with the EMA of a source group."""
